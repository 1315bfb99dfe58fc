"""Imported Qwen2.5-VL gives the results of transformers for images and videos; an export restores the folder.

Measured worst cases: see tests/parity.json. Windows of the reference models have 4 patches a side, so that most images
and frames have several, with smaller ones at their edges.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.images.video import RateChoice, VideoConfig, VideoTransform
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.sample import VideoSize
from mmscale.errors import CheckpointError
from mmscale.hf.forward_config import forward_config
from mmscale.hf.layouts import layout_of
from mmscale.models.build import media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.windows import WindowRows
from tests.hf.pages import AUTO, BOS, EOS, PAD, Seen
from tests.hf.reference_models import import_reference, imported, loaded
from tests.hf.test_published import PUBLISHED, shipped
from tests.hf.test_qwen2_vl import PIXELS, SPECIAL
from tests.hf.test_qwen2_vl_video import video_seen
from tests.hf.train_and_export import VOCABULARY, captions, train_and_export
from tests.models.reference_models import distance, randomise
from tests.parity_table import Recorder

pytestmark = pytest.mark.parity
BOUND, GRADIENT_BOUND = 2e-6, 6e-6
VIDEOS: list[list[Any]] = [
    [(4, 60, 112), "a video"],
    ["x", (5, 90, 70, 3), "three a second", (50, 50)],
    [(31, 90), "one, ", (2, 40, 90), "two", (6, 64, 64, 5), "three"],
    [(1, 56, 56), "still"],
]
SLOW: list[list[Any]] = [["xy", (8, 56, 84, 1), "one frame a second, so its text overlaps it there", (40, 40), "end"]]
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "out_hidden_size": 64,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
"""Configuration of a tiny tower with windows, which Qwen2.5-Omni has too."""


def reference_model(tied: bool = False, seed: int = 0, vocabulary: int = 272) -> Any:
    """Return a tiny random model. The image token is 3, or 4 with the emoji tokenizer's vocabulary."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={**VISION, "tokens_per_second": 2},
        image_token_id=4 if vocabulary == VOCABULARY else 3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        video_token_id=6,
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def processor(tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    words = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=SPECIAL
    )
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**PIXELS), words, Qwen2VLVideoProcessor())


_PUBLISHED = {  # By memory, in the format of version 4 of transformers.
    **PUBLISHED["qwen2-vl-7b"],
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def test_the_published_configuration_is_the_shipped_one() -> None:
    found = layout_of("qwen2_5_vl").model_config(_PUBLISHED, "config.json")
    assert forward_config(found) == forward_config(shipped("qwen2.5-vl-7b"))


def test_both_positions_of_text_after_a_video_are_exported() -> None:
    model, layout = shipped("qwen2.5-vl-7b"), layout_of("qwen2_5_vl")
    assert isinstance(model, ModelConfig)
    values = model.model_dump()
    values["decoder"]["rope"]["text_after_video"] = "space"
    assert layout.config_values(ModelConfig.model_validate(values)) == layout.config_values(model)


def test_a_hostile_number_of_blocks_is_rejected_at_once() -> None:
    vision = {**_PUBLISHED["vision_config"], "depth": 1 << 40}
    with pytest.raises(CheckpointError, match="num_layers"):
        layout_of("qwen2_5_vl").model_config({**_PUBLISHED, "vision_config": vision}, "config.json")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, Any]:
    theirs = reference_model()
    return import_reference(theirs, tmp_path), theirs


def _as_transformers(ours: Any) -> Any:
    """Let text follow a video as in transformers."""
    values = ours.config.model_dump()
    values["decoder"]["rope"]["text_after_video"] = "space"
    ours.config = ModelConfig.model_validate(values)
    return ours


def seen_as_there(folder: Path, ours: Any, pages: list[Any]) -> Seen:
    """Return both inputs of pages; text of ours follows a video as in transformers."""
    return video_seen(folder, _as_transformers(ours), pages, processor)


def test_grids_seconds_and_positions(models: tuple[Any, Any], tmp_path: Path) -> None:
    """With the option for it, positions equal those of transformers; by default, text follows the last frame."""
    ours, theirs = models
    author = video_seen(tmp_path, ours, SLOW, processor).documents[0]
    seen = seen_as_there(tmp_path, ours, [*VIDEOS, *SLOW])
    for document, inputs in zip(seen.documents, seen.inputs, strict=True):
        clips = [item for item in document.items if item.later_values is not None]
        found = inputs.get("second_per_grid_ts")
        if clips:
            grids, seconds = inputs["video_grid_thw"].tolist(), found.tolist()
            assert [list(item.grid) for item in clips] == grids
            assert np.float32([item.seconds_per_step for item in clips]).tolist() == seconds
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        positions, _ = theirs.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            **{name: inputs.get(name) for name in names},
        )
        assert document.position_ids.T.tolist() == positions[:, 0].tolist()
    # Three tokens, then four pairs of 4 x 6 patches, two seconds apart.
    assert author.position_ids[4:28:6].tolist() == [[4 + 4 * pair, 4, 4] for pair in range(4)]
    assert author.position_ids[28].tolist() == [17, 17, 17]
    assert seen.documents[-1].position_ids[28].tolist() == [7, 7, 7]


def test_text_after_a_video_in_both_ways(models: tuple[Any, Any], tmp_path: Path, parity: Recorder) -> None:
    ours, theirs = models
    seen = video_seen(tmp_path, ours, SLOW, processor)
    (inputs,) = seen.inputs
    positions = torch.from_numpy(seen.documents[0].position_ids.T.astype(np.int64))[:, None]
    with torch.no_grad():
        parity(
            "qwen2_5_vl", "logits", distance(seen.ours(ours), theirs(**inputs, position_ids=positions).logits[0]), BOUND
        )
        assert distance(seen.ours(ours), theirs(**inputs).logits[0]) > 100 * BOUND
        same = seen_as_there(tmp_path, ours, SLOW)
        parity("qwen2_5_vl", "logits", distance(same.ours(ours), theirs(**inputs).logits[0]), BOUND)


def test_windows_and_their_pairs_equal_a_brute_force() -> None:
    from transformers.vision_utils import get_vision_window_index

    grids = [(1, 16, 8), (3, 18, 10), (2, 2, 2), (1, 8, 34)]
    rows = WindowRows.from_grids(grids, 8)
    index, bounds = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    assert list(rows.windows.bounds) == bounds.tolist()
    frames, first = [], 0
    for time, height, width in grids:
        for _ in range(time):
            frames.append(np.arange(first, first + height * width).reshape(height, width))
            first += height * width
    windows = [
        frame[r : r + 8, c : c + 8]
        for frame in frames
        for r in range(0, frame.shape[0], 8)
        for c in range(0, frame.shape[1], 8)
    ]
    assert rows.order.tolist() == np.concatenate([window.ravel() for window in windows]).tolist()
    assert rows.order[rows.restore].tolist() == list(range(first))
    assert len(index) * 4 == first


def test_pairs_of_patches_are_counted_in_windows(models: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = models
    batch = video_seen(tmp_path, ours, [VIDEOS[0]], processor).batch()
    counts = ours.config.vision.counts(batch.media["image"])
    (_, height, width), side = batch.media["image"].grids[0], 4
    own = [(row // side, column // side) for row in range(height) for column in range(width)]
    assert counts["window_pairs"] == 2 * sum(a == b for a in own for b in own)
    assert counts["tower_pairs"] == 2 * (height * width) ** 2


def test_seconds_between_frames_are_theirs_at_every_rate() -> None:
    """The index rounds durations to microseconds, and a time just below a whole number would be one position less."""
    from transformers.video_utils import VideoMetadata

    spec = MediaSpec(Placement.EMBEDDING, 14, 2, frames_per_patch=2)
    rates = [Fraction(24), Fraction(30000, 1001), Fraction(25), Fraction(25, 2), Fraction(7), Fraction(1, 3)]
    for rate in rates:
        for total in (8, 61, 300):
            size = VideoSize(total, round(10**6 * total / rate), 56, 56)
            for spread in ("ends", "starts"):
                transform = VideoTransform(VideoConfig(frames=RateChoice(per_second=2, spread=spread)), spec)
                (item,) = transform.dry_run(size)
                chosen = transform.config.frames.count(size, 2)
                metadata = VideoMetadata(total, float(rate), frames_indices=[0] * chosen)
                assert item.seconds_per_step == 2 / metadata.sampled_fps
    (item,) = transform.dry_run(VideoSize(3, 1_234_567, 56, 56))  # No simple rate has this duration.
    assert item.seconds_per_step == pytest.approx(2 * 1.234567 / 2)


@pytest.mark.dist
@pytest.mark.slow
def test_trained_on_two_ranks(tmp_path: Path) -> None:
    theirs = reference_model(vocabulary=VOCABULARY)
    theirs.save_pretrained(tmp_path / "theirs")
    transforms = {"kind": "native", "min_pixels": 28 * 28, "max_pixels": 84 * 84}
    again = loaded(train_and_export(tmp_path / "theirs", tmp_path, captions(transforms)), AUTO)
    block = again.model.visual.blocks[0]
    assert not torch.equal(block.mlp.gate_proj.bias, theirs.model.visual.blocks[0].mlp.gate_proj.bias)
    assert media_spec(imported(tmp_path / "theirs", tmp_path / "again")[0].config).tokens_per_second == 2
