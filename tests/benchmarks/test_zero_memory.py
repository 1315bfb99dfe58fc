"""The memory benchmark: measured bytes on real ranks equal the formula plus the padding of shards."""

from __future__ import annotations

import pytest
import torch

from benchmarks import zero_memory
from benchmarks.zero_memory import formula, storage_bytes, text_model
from mmscale.models.build import build_model


def test_the_formula_gives_the_papers_figures() -> None:
    """Figure 1 of the paper: 7.5 billion values on 64 ranks, in GB. Its gradients have 2 bytes, ours 4."""
    per_stage = [formula(7_500_000_000, 64, stage, "bf16") for stage in range(4)]
    totals = [
        (part.weights + part.gradients / (2 if n else 1) + part.optimizer) / 1e9 for n, part in enumerate(per_stage)
    ]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_a_storage_counts_once() -> None:
    values = torch.zeros(10)
    assert storage_bytes([values, values[2:], values.view(2, 5), torch.zeros(3)]) == 52


@pytest.mark.dist
@pytest.mark.slow
def test_what_is_held_equals_the_formula() -> None:
    words = ["--ranks", "2", "--precisions", "bf16", "--width", "24", "--vocab", "2048", "--json"]
    rows = list(zero_memory.measure(zero_memory.arguments(words)))
    shapes = [parameter.numel() for parameter in build_model(text_model(24, 2048), seed=None).parameters()]
    assert [row.zero_stage for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row.values == sum(shapes)
        assert row.start_peak > 0
        assert row.steps_peak > 0
        if row.zero_stage == 3:  # Every parameter is sharded on its own.
            shard = sum(-(-numel // 2) for numel in shapes)
            assert (row.held["weights"], row.held["optimizer"]) == (2 * shard, 12 * shard)
        else:  # Two groups are sharded; each is padded by at most a multiple of two values per rank.
            assert 0 <= row.held["weights"] - row.formula.weights <= 2 * 2 * 4
            assert 0 <= row.held["optimizer"] - row.formula.optimizer <= 2 * 12 * 4


@pytest.mark.dist
@pytest.mark.slow
def test_what_is_held_in_8_bits_is_whole_blocks() -> None:
    """Two moments of one byte per value and four bytes per block; each rank's part has blocks of 256 values."""
    words = ["--ranks", "2", "--precisions", "fp32", "--stages", "0", "3", "--width", "24", "--vocab", "2048"]
    plain, sharded = zero_memory.measure(zero_memory.arguments([*words, "--state-bits", "8", "--json"]))
    shapes = [parameter.numel() for parameter in build_model(text_model(24, 2048), seed=None).parameters()]
    block = 2 * (256 + 4)
    assert plain.held["optimizer"] == block * sum(-(-numel // 256) for numel in shapes)
    shards = [-(-numel // 2) for numel in shapes]
    first = [-(-shard // 256) for shard in shards]
    second = [-(-numel // 256) - shard // 256 for numel, shard in zip(shapes, shards, strict=True)]
    assert sharded.held["optimizer"] == 4 * sum(shards) + block * max(sum(first), sum(second))
    assert plain.formula.optimizer == pytest.approx(2.03125 * sum(shapes))
