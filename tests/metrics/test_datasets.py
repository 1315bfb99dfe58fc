"""Figures of each data set: sums over ranks give the means of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.errors import FaultKind
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import LoaderState
from data_pipeline.sample import Provenance
from mmscale.metrics.datasets import figures, totals
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


def test_ranks_together_give_the_weighted_mean_of_each_data_set() -> None:
    names = ["a", "b", "c"]
    skip = Skipped("c", 0, 7, 0, "shard", "key", FaultKind.DECODE, "no image")
    ranks = [_step([("a", 4), ("b", 9)]), _step([("a", 6)], (skip,))]
    losses = [[[3.0, 8.0]], [[5.0]]]
    sums = np.sum([totals(rank, loss, names) for rank, loss in zip(ranks, losses, strict=True)], axis=0)
    found = figures(names, sums.tolist())
    (first,), (second,) = (rank.microbatches for rank in ranks)
    middle = first.segments.bounds[1]
    weight_a = float(first.loss_weights[:middle].sum() + second.loss_weights.sum())
    assert found["dataset/a/loss"] == pytest.approx((3 + 5) / weight_a)
    assert found["dataset/b/loss"] == pytest.approx(8 / float(first.loss_weights[middle:].sum()))
    assert "dataset/c/loss" not in found
    assert [found[f"dataset/{name}/samples"] for name in names] == [2, 1, 0]
    assert [found[f"dataset/{name}/tokens"] for name in names] == [10, 9, 0]
    assert [found[f"dataset/{name}/skipped"] for name in names] == [0, 0, 1]
