"""Positions of sound among images and text on three axes, against the thinker of Qwen2.5-Omni in transformers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as theirs

from data_pipeline.document import MediaItem
from data_pipeline.images.image_tokens import ImageLayout
from data_pipeline.media_spec import AudioSpec, MediaSpec, Placement
from data_pipeline.packing.draft import Draft

IMAGE, VIDEO, AUDIO, VISION_START, AUDIO_START, VISION_END, AUDIO_END = range(1, 8)
SPEC = MediaSpec(
    Placement.EMBEDDING,
    patch_size=2,
    merge=2,
    position_axes=3,
    audio=AudioSpec(num_bins=4, padded=False, reductions=((3, 1, 1), (3, 2, 1), (2, 2, 0))),
)


@pytest.mark.parity
@pytest.mark.parametrize("pieces", ["tat", "tiat", "aitat", "taita"])
def test_positions_are_those_of_the_thinker(pieces: str) -> None:
    draft, frames, grids, layout = Draft(SPEC), [], [], ImageLayout((VISION_START,), (VISION_END,))
    for number, piece in enumerate(pieces):
        if piece == "t":
            draft.add_tokens(range(20, 25 + number), 1.0)
        elif piece == "a":
            frames.append(97 + 31 * number)
            values = np.zeros((frames[-1], 4), np.float32)
            item = MediaItem(values, (len(values), 1, 1), embedded=True, modality="audio")
            draft.add_clip([item], AUDIO, [AUDIO_START], [AUDIO_END])
        else:
            grids.append((1, 4, 6 + 2 * number))
            pixels = np.zeros((4 * grids[-1][2], SPEC.patch_dim), np.uint8)
            draft.add_image((MediaItem(pixels, grids[-1], embedded=True),), IMAGE, layout)
    document = draft.finish(None)
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
    model.get_llm_pos_ids_for_vision = base.get_llm_pos_ids_for_vision.__get__(model)
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    expected, _ = base.get_rope_index(
        model,
        ids,
        image_grid_thw=torch.tensor(grids).reshape(-1, 3),
        attention_mask=torch.ones_like(ids),
        audio_seqlens=torch.tensor(frames),
    )
    assert expected[:, 0].T.tolist() == document.position_ids.tolist()
