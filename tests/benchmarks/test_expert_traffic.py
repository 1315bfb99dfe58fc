"""The traffic benchmark: its formula follows from a simulation of placements, and real collectives send its bytes."""

from __future__ import annotations

import itertools
from contextlib import closing
from fractions import Fraction

import pytest

from benchmarks.expert_traffic import NODE, SHAPES, CountedRow, CountingRank, MoeShape, small_model, traffic
from benchmarks.steps.ranks import Side
from mmscale.config import load
from mmscale.models.build import build_model, count_parameters
from mmscale.models.config import ModelConfig
from mmscale.nn.moe import MoeConfig
from tests.engine.ranks import ROOT

TINY = MoeShape("tiny", 1, 2, 64, 1, 3, 64 * 3 * 3 * 2 + 512)


@pytest.mark.parametrize(("ranks", "size"), [(8, 8), (16, 1), (16, 2), (16, 8), (64, 16), (64, 64)])
def test_a_node_receives_what_it_needs_and_does_not_hold(ranks: int, size: int) -> None:
    """One unit for each (expert, shard): who holds it, and which nodes need it."""
    shards = ranks // size
    node_of = [rank // NODE for rank in range(ranks)]
    slices = {node: {rank % size for rank in range(ranks) if node_of[rank] == node} for node in set(node_of)}
    foreign = 0
    for part, shard in itertools.product(range(size), range(shards)):
        holder = shard * size + part
        foreign += sum(part in held and node_of[holder] != node for node, held in slices.items())
    unit = Fraction(8 * TINY.expert_values, ranks)  # Bytes of a shard: all ranks hold equally many values.
    rest = 8 * 512 * Fraction(len(slices) - 1, len(slices))
    # Each row goes to a random rank of its group, and back, in both passes.
    group = Fraction(min(size, NODE), size)
    rows = NODE * 4 * 2 * 100 * TINY.dim * (1 - group)
    expected = foreign * unit / len(slices) + rest + rows
    assert traffic(TINY, ranks, size, 100).into_node == pytest.approx(float(expected))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_limit_decides_for_every_group_and_world(recompute: bool) -> None:
    for shape in SHAPES:
        limit = shape.break_even(recompute=recompute)
        for ranks, size in ((8, 2), (8, 8), (64, 8), (64, 64), (512, 16)):
            for tokens, less in ((int(0.99 * limit), True), (int(1.01 * limit), False)):
                alone, shared = (traffic(shape, ranks, n, tokens, recompute=recompute) for n in (1, size))
                assert (shared.total < alone.total) == less
                if size > NODE:
                    alone, shared = (
                        traffic(shape, ranks, n, tokens // NODE, recompute=recompute).into_node for n in (1, size)
                    )
                    assert (shared < alone) == less


@pytest.mark.parametrize(("shape", "name"), [*zip(SHAPES, ("olmoe-1b-7b", "aria"), strict=True)])
def test_the_sizes_are_those_of_the_shipped_model(shape: MoeShape, name: str) -> None:
    config = load(ROOT / f"configs/models/{name}.yaml", [], ModelConfig).value
    decoder, mlp = config.decoder, config.decoder.mlp
    assert isinstance(mlp, MoeConfig)
    sizes = (decoder.num_layers, decoder.hidden_dim, mlp.num_experts, mlp.experts_per_token, mlp.expert_dim)
    assert sizes == (shape.layers, shape.dim, shape.num_experts, shape.experts_per_token, shape.expert_dim)
    counted = count_parameters(config)
    assert counted.total == shape.values
    idle = shape.expert_values * (1 - Fraction(mlp.experts_per_token, mlp.num_experts))
    assert counted.active == shape.values - idle


@pytest.mark.dist
@pytest.mark.slow
def test_real_collectives_send_the_bytes_of_the_formula() -> None:
    values = sum(parameter.numel() for parameter in build_model(small_model(), seed=None).parameters())
    shape = MoeShape("small", 2, 48, 4, 2, 24, values)
    with closing(Side("traffic", 2, 1, CountingRank)) as ranks:
        for size, recompute in ((1, False), (2, False), (2, True)):
            row = CountedRow(2, size, **ranks.order("count", size=size, recompute=recompute))
            assert row.counted == pytest.approx(row.expected, rel=1e-12)
            found = traffic(shape, 2, size, 256)
            # All sizes here are even, so two ranks pad no shard.
            assert row.counted["allgather"] + row.counted["reduce_scatter"] == found.rest + found.experts
            assert (row.counted["alltoall"] == 0) == (size == 1)
