"""Shuffled frames are the same frames in another order: a control of scores that depend on motion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.document import Document
from data_pipeline.errors import DataPipelineError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.evaluate import EvaluationConfig, check
from mmscale.evaluate.config import HeldOutSet
from mmscale.evaluate.heldout import PromptBuilder, document_builder, require_frames, shuffle_frames
from tests.evaluate.emoji_models import EMOJI, data_config

CLIPS = Path(__file__).resolve().parents[2] / "examples/omni/shards/clips-heldout-both.manifest"


def _frames(document: Document, spec: MediaSpec) -> Iterator[bytes]:
    """Yield the patches of each frame of the only item, in order of time."""
    (item,) = document.items
    patches = item.grid[1] * item.grid[2]
    for group in range(item.grid[0]):
        rows = slice(group * patches, (group + 1) * patches)
        yield item.values[rows].tobytes()
        for later in range(spec.frames_per_patch - 1):
            assert item.later_values is not None
            yield item.later_values[rows, later * spec.patch_dim : (later + 1) * spec.patch_dim].tobytes()


@pytest.mark.parametrize("per_patch", [1, 2, 4])
def test_shuffled_frames_are_the_same_frames_in_another_order(per_patch: int) -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, frames_per_patch=per_patch, fixed_grid=(2, 2))
    images = data_config({"kind": "fixed"}).model_dump()
    video = {"frames": {"kind": "uniform", "num_frames": 8}}
    data = DataConfig.model_validate({**images, "datasets": [{**images["datasets"][0], "video": video}]})
    tokenizer = load_tokenizer(data.tokenizer)
    held = HeldOutSet(name="clips", manifest=CLIPS, field="motion")
    sample = next(iter(read_samples(CLIPS)))
    document = document_builder(held, None, data, tokenizer, spec)(sample)
    before, found = list(_frames(document, spec)), []
    assert len(set(before)) == 8
    for seed in range(6):
        after = list(_frames(shuffle_frames(document, spec, seed), spec))
        assert sorted(after) == sorted(before)
        assert after != before
        found.append(tuple(after))
    assert len(set(found)) > 3
    assert list(_frames(shuffle_frames(document, spec, 0), spec)) == list(found[0])
    assert list(_frames(document, spec)) == before, "the document itself is unchanged"

    batches = [
        PromptBuilder.of_images(held.model_copy(update={"shuffle_frames": each}), data, tokenizer, spec)([sample])
        for each in (False, True)
    ]
    assert (batches[0].token_ids == batches[1].token_ids).all()
    values = [np.asarray(batch.media["image"].values) for batch in batches]
    assert values[0].shape == values[1].shape
    assert (values[0] != values[1]).any()


def test_a_picture_has_no_frames_to_shuffle() -> None:
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, frames_per_patch=2, fixed_grid=(2, 2))
    data = data_config({"kind": "fixed"})
    held = HeldOutSet(name="held", manifest=EMOJI / "shards/heldout-both.manifest", field="name", shuffle_frames=True)
    sample = next(iter(read_samples(held.manifest)))
    prompts = PromptBuilder.of_images(held, data, load_tokenizer(data.tokenizer), spec)
    with pytest.raises(SampleError, match="no video with at least two frames"):
        prompts([replace(sample, fields={})])


def test_a_picture_is_found_beyond_the_samples_that_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_MOST_DECODED", 0)
    spec = MediaSpec(Placement.EMBEDDING, patch_size=8, frames_per_patch=2, fixed_grid=(2, 2))
    block = {
        "name": "held",
        "manifest": EMOJI / "shards/heldout-both.manifest",
        "field": "name",
        "limit": 4,
        "choices": 2,
    }
    for shuffles in (False, True):
        config = EvaluationConfig.model_validate({"sets": [{**block, "shuffle_frames": shuffles}], "captions": None})
        with pytest.raises(DataPipelineError, match="no video with") if shuffles else nullcontext():
            check.check_sets(config, data_config({"kind": "fixed"}), spec)
    clip = next(iter(read_samples(CLIPS)))
    video = {"frames": {"kind": "uniform", "num_frames": 8}}
    images = data_config({"kind": "fixed"}).model_dump()
    data = DataConfig.model_validate({**images, "datasets": [{**images["datasets"][0], "video": video}]})
    held = HeldOutSet(name="clips", manifest=CLIPS, field="motion")
    require_frames(document_builder(held, None, data, load_tokenizer(data.tokenizer), spec).dry_run(clip), spec)
