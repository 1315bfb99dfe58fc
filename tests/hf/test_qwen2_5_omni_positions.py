"""Positions of sounds, images, videos and text on three axes, against the thinker of Qwen2.5-Omni in transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as theirs

from data_pipeline.document import Document, ImageExtent, MediaItem
from data_pipeline.images.image_tokens import ImageLayout
from data_pipeline.media_spec import AudioSpec, MediaSpec, Placement
from data_pipeline.packing.draft import Draft

IMAGE, VIDEO, AUDIO, VISION_START, AUDIO_START, VISION_END, AUDIO_END = range(1, 8)
SPEC = MediaSpec(
    Placement.EMBEDDING,
    patch_size=2,
    merge=2,
    position_axes=3,
    frames_per_patch=2,
    tokens_per_second=25,
    audio=AudioSpec(num_bins=4, padded=False, reductions=((3, 1, 1), (3, 2, 1), (2, 2, 0))),
)


def _theirs(document: Document, **inputs: Any) -> list[list[int]]:
    """Return the positions that the thinker gives to the tokens of a document."""
    config = SimpleNamespace(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=VISION_START,
        audio_start_token_id=AUDIO_START,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        vision_config=SimpleNamespace(spatial_merge_size=2),
    )
    base = theirs.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(model, name, getattr(base, name).__get__(model))
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    found, _ = base.get_rope_index(model, ids, attention_mask=torch.ones_like(ids), **inputs)
    positions: list[list[int]] = found[:, 0].T.tolist()
    return positions


@pytest.mark.parity
@pytest.mark.parametrize("pieces", ["tat", "tiat", "aitat", "taita"])
def test_positions_are_those_of_the_thinker(pieces: str) -> None:
    draft, frames, grids, layout = Draft(SPEC), [], [], ImageLayout((VISION_START,), (VISION_END,))
    for number, piece in enumerate(pieces):
        if piece == "t":
            draft.add_tokens(range(20, 25 + number), 1.0)
        elif piece == "a":
            frames.append(97 + 31 * number)
            draft.add_clip([_sound(frames[-1])], AUDIO, [AUDIO_START], [AUDIO_END])
        else:
            grids.append((1, 4, 6 + 2 * number))
            pixels = np.zeros((4 * grids[-1][2], SPEC.patch_dim), np.uint8)
            draft.add_image((MediaItem(pixels, grids[-1], embedded=True),), IMAGE, layout)
    document = draft.finish(None)
    expected = _theirs(document, image_grid_thw=torch.tensor(grids).reshape(-1, 3), audio_seqlens=torch.tensor(frames))
    assert expected == document.position_ids.tolist()


def _sound(frames: int) -> MediaItem:
    return MediaItem(np.zeros((frames, 4), np.float32), (frames, 1, 1), embedded=True, modality="audio")


def _video(grid: tuple[int, int, int], seconds: float) -> MediaItem:
    pixels = np.zeros((math.prod(grid), SPEC.patch_dim), np.uint8)
    return MediaItem(pixels, grid, embedded=True, later_values=pixels, seconds_per_step=seconds, is_video=True)


@pytest.mark.parity
def test_times_of_videos_are_theirs_at_every_rate() -> None:
    """A product in another order would be on the other side of a whole number for some of these."""
    for rate in np.linspace(0.3, 30, 100):
        draft, grid = Draft(SPEC), (40, 2, 2)
        draft.add_image((_video(grid, 2 / rate),), VIDEO, ImageLayout((VISION_START,), (VISION_END,)))
        document = draft.finish(None)
        expected = _theirs(
            document,
            video_grid_thw=torch.tensor([grid]),
            second_per_grids=torch.tensor([2 / rate], dtype=torch.float32),
        )
        assert expected == document.position_ids.tolist()


@pytest.mark.parity
@pytest.mark.parametrize("seconds", [0.1, 0.5, 1, 1.7, 2, 3.3, 9])
@pytest.mark.parametrize("frames", [9, 150, 1000])
def test_turns_of_frames_and_sound_have_the_positions_of_the_thinker(seconds: float, frames: int) -> None:
    """Videos that are longer or shorter than their sound, and pairs of frames that are farther apart than a turn."""
    draft, grid = Draft(SPEC), (5, 4, 12)
    draft.add_tokens([20, 21], 1.0)
    starts, ends = (VISION_START, AUDIO_START), (AUDIO_END, VISION_END)
    draft.add_interleaved(_video(grid, seconds), [_sound(frames)], (VIDEO, AUDIO), starts, ends, 2)
    draft.add_tokens([22, 23], 1.0)
    document = draft.finish(None)
    expected = _theirs(
        document,
        video_grid_thw=torch.tensor([grid]),
        second_per_grids=torch.tensor([seconds], dtype=torch.float32),
        audio_seqlens=torch.tensor([frames]),
        use_audio_in_video=True,
    )
    assert expected == document.position_ids.tolist()
    of_video, of_sound = document.scatter_index[:60], document.scatter_index[60:]
    assert (document.token_ids[of_video] == VIDEO).all()
    assert (document.token_ids[of_sound] == AUDIO).all()
    assert document.images == (ImageExtent(2, 0, len(document.token_ids) - 2, is_video=True),)
