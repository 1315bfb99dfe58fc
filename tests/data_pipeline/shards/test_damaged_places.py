"""A data set with all kinds of damage, under ``skip``: the other samples keep their content and their position."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import FaultKind
from data_pipeline.history.digest import step_digest
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.prepare.verify import jobs_of, verify
from tests.data_pipeline.conftest import Members, WriteSet, captioned
from tests.data_pipeline.loader.test_damaged_data import (
    DAMAGES,
    NUM_SAMPLES,
    SHARD_SAMPLES,
    damaged_samples,
    fragile_tokenizer,
    lose,
    rot,
)

pytestmark = pytest.mark.fault
__all__ = ["fragile_tokenizer"]  # All tests here use this fixture.

LOST_SHARD = 5
LANES = 4
PackedSample = tuple[int, int, str]
"""Epoch and sample of a document, and the digest of its pack, which contains no other document."""


@pytest.fixture
def config(mixture_config: DataConfig, tmp_path: Path) -> DataConfig:
    """Two epochs with one document per pack, so that a pack's digest is that of its document."""
    dataset = {
        "name": "only",
        "manifest": tmp_path / "only" / "only.manifest",
        "max_epochs": 2,
        "transforms": {"kind": "fixed", "augment": {"shift": 0.1, "flip": 0.5}},
    }
    changes = {
        "datasets": [dataset],
        "lanes": LANES,
        "packing": {"max_tokens": 90, "max_documents": 1, "look_ahead": 1},
        "order": {"block_size": 3, "window_blocks": 2},
        "faults": {"on_error": "skip", "shard": "skip", "max_share": 0.9},
    }
    return DataConfig.model_validate(mixture_config.model_dump() | changes)


def sequences(
    config: DataConfig, spec: MediaSpec
) -> tuple[list[list[PackedSample]], list[tuple[int, int, int, FaultKind]]]:
    """Return the documents of each lane in order, and (lane, epoch, sample, kind) of all skipped samples."""
    lanes: list[list[PackedSample]] = [[] for _ in range(LANES)]
    skipped = []
    with Loader(config, spec, seed=1) as loader:
        for step in loader:
            for lane, microbatch in enumerate(step.microbatches):
                origin = microbatch.provenance[0]
                if origin is not None:
                    lanes[lane].append((origin.epoch, origin.index, step_digest([microbatch])))
            skipped += [(skip.lane, skip.epoch, skip.index, skip.kind) for skip in step.skipped]
            if step.exhausted:
                return lanes, skipped
    raise AssertionError("unreachable")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_at_once_takes_its_own_samples_out_of_their_lanes_and_changes_nothing_else(
    config: DataConfig, hybrid_spec: MediaSpec, write_set: WriteSet, workers: int
) -> None:
    sound: list[Members] = [captioned(number) for number in range(NUM_SAMPLES)]
    write_set("only", sound)
    whole, nothing = sequences(config, hybrid_spec)
    assert nothing == []

    damaged, wrong = damaged_samples()
    manifest = write_set("only", damaged)
    lost = set(range(LOST_SHARD * SHARD_SAMPLES, (LOST_SHARD + 1) * SHARD_SAMPLES))
    rotten = rot(config, [i for i in range(NUM_SAMPLES) if i % 11 == 0 and i not in wrong and i not in lost])
    lose(manifest.parent / f"part-{LOST_SHARD:05d}.tar")
    bad = wrong | dict.fromkeys(rotten, FaultKind.CHECKSUM) | dict.fromkeys(lost, FaultKind.SHARD)
    assert set(bad.values()) == {FaultKind.CHECKSUM, FaultKind.SHARD, *DAMAGES}, "every kind should occur"

    lanes, skipped = sequences(config.model_copy(update={"workers": workers}), hybrid_spec)
    assert lanes == [[packed for packed in lane if packed[1] not in bad] for lane in whole]
    expected = [(n, epoch, i, bad[i]) for n, lane in enumerate(whole) for epoch, i, _ in lane if i in bad]
    assert Counter(skipped) == Counter(expected), "each in the lane where it would have been, and its kind"


def test_verify_finds_the_same_samples_before_a_run_as_a_run_leaves_out(
    config: DataConfig, hybrid_spec: MediaSpec, write_set: WriteSet
) -> None:
    """A run also skips samples that only a template, a tokenizer or a budget rejects, such as too long captions."""
    damaged, wrong = damaged_samples()
    write_set("only", damaged)
    rotten = rot(config, [i for i in range(NUM_SAMPLES) if i % 11 == 0 and i not in wrong])
    found: set[int] = set()
    for report in verify(jobs_of(config.datasets[0].manifest)[1]):
        found |= {int(damage.key) for damage in report.damages}
    _, skipped = sequences(config, hybrid_spec)
    by_run = {sample: kind for _, _, sample, kind in skipped}
    assert found <= set(by_run)
    assert set(rotten) <= found
    assert {by_run[sample] for sample in set(by_run) - found} == {
        FaultKind.TEXT,
        FaultKind.DOCUMENT,
        FaultKind.UNEXPECTED,
    }
    unfit = {b"{}", b'{"captions": [""]}'}
    for sample in set(by_run) - found:
        assert damaged[sample]["json"] in unfit or by_run[sample] in (FaultKind.DOCUMENT, FaultKind.UNEXPECTED)
