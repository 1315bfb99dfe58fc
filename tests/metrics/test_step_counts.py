"""Counts of a step by name: sums over ranks give the means of the whole."""

from __future__ import annotations

import pytest

from data_pipeline.errors import FaultKind
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import LoaderState
from data_pipeline.sample import Provenance
from mmscale.engine.engine import StepReport
from mmscale.metrics.step_counts import count_step, document_stats, step_metrics
from mmscale.models.build import build_model, media_spec
from tests.models.packs import pack, text_document
from tests.models.tiny import VOCAB, config


def _step(documents: list[tuple[str, int]], skipped: tuple[Skipped, ...] = ()) -> StepBatch:
    spec = media_spec(build_model(config(None)).config)
    made = [text_document(i + 1, length, VOCAB) for i, (_, length) in enumerate(documents)]
    origins = tuple(Provenance(name, "shard", "key", i) for i, (name, _) in enumerate(documents))
    batch = pack(made, spec)
    batch = batch.__class__(**{**vars(batch), "provenance": origins})
    return StepBatch(0, (batch,), skipped, LoaderState("", 1, {}), len(documents), batch.num_tokens)


def metrics(sums: dict[str, float], names: list[str]) -> dict[str, float | int]:
    """Return the metrics of a step without operations."""
    return step_metrics(StepReport(0.0, 0.0, 0.0, {}, False), {"model_flops": 0, "hardware_flops": 0, **sums}, names)


def test_ranks_together_give_the_weighted_mean_of_each_data_set() -> None:
    names = ["a", "b", "c"]
    skip = Skipped("c", 0, 7, 0, "shard", "key", FaultKind.DECODE, "no image")
    ranks = [_step([("a", 4), ("b", 9)]), _step([("a", 6)], (skip,))]
    losses = [[[3.0, 8.0]], [[5.0]]]
    counts = [count_step(rank, document_stats(rank, loss), names) for rank, loss in zip(ranks, losses, strict=True)]
    assert [*counts[0]] == [*counts[1]]
    found = metrics({name: sum(count[name] for count in counts) for name in counts[0]}, names)
    (first,), (second,) = (rank.microbatches for rank in ranks)
    middle = first.segments.bounds[1]
    weight_a = float(first.loss_weights[:middle].sum() + second.loss_weights.sum())
    assert found["dataset/a/loss"] == pytest.approx((3 + 5) / weight_a)
    assert found["dataset/b/loss"] == pytest.approx(8 / float(first.loss_weights[middle:].sum()))
    assert "dataset/c/loss" not in found
    assert [found[f"dataset/{name}/samples"] for name in names] == [2, 1, 0]
    assert [found[f"dataset/{name}/tokens"] for name in names] == [10, 9, 0]
    assert [found[f"dataset/{name}/skipped"] for name in names] == [0, 0, 1]
    assert (found["skipped_samples"], found["faults/decode"]) == (1, 1)


def test_skipped_samples_are_counted_by_kind_and_kinds_that_did_not_occur_are_absent() -> None:
    kinds = [FaultKind.EXCLUDED, FaultKind.CHECKSUM, FaultKind.EXCLUDED]
    skipped = tuple(Skipped("a", 0, 7, 0, "shard", "key", kind, "no image") for kind in kinds)
    step = _step([("a", 4)], skipped)
    found = metrics(count_step(step, document_stats(step, []), ["a"]), ["a"])
    counted = {name: value for name, value in found.items() if name.startswith(("faults/", "skipped"))}
    assert counted == {"skipped_samples": 3, "faults/checksum": 1, "faults/excluded": 2}
    step = _step([("a", 4)])
    found = metrics(count_step(step, document_stats(step, []), ["a"]), ["a"])
    assert [name for name in found if name.startswith("faults/")] == []
    assert (found["skipped_samples"], found["dataset/a/loss"]) == (0, 0.0)
