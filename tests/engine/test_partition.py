"""Ranges of parameters without an engine, and the gradients that the optimizer of stage 3 reads."""

from __future__ import annotations

import math
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmscale.checkpoint.save import tied_names
from mmscale.checkpoint.share import persistent_buffers
from mmscale.dist import World
from mmscale.engine.graph import read_gradients_in_place
from mmscale.engine.partition import frozen_ranges, parameter_table, shard_range
from tests.engine.programs import lanes_of, make_engine
from tests.engine.ranks import run_ranks
from tests.engine.toy import toy_model


@given(st.integers(0, 200), st.integers(1, 17))
def test_equal_pieces_follow_one_another_and_only_the_last_ones_are_short(numel: int, world_size: int) -> None:
    pieces = [shard_range(numel, rank, world_size) for rank in range(world_size)]
    assert [value for low, high in pieces for value in range(low, high)] == list(range(numel))
    lengths = [high - low for low, high in pieces]
    assert lengths[0] == math.ceil(numel / world_size)
    assert lengths == sorted(lengths, reverse=True)
    full = [length for length in lengths if length == lengths[0]]
    assert sum(full) <= numel < sum(full) + max(lengths[0], 1)


def test_a_model_that_does_not_learn_is_filled_whole_below_stage_3() -> None:
    model = toy_model()
    for rank in range(2):
        world = World(rank, 2, rank, torch.device("cpu"))
        found = list(frozen_ranges(model, 2, world))
        assert [owned.name for owned in found] == [name for name, _ in model.named_parameters()]
        for owned in found:
            parameter = model.get_parameter(owned.name)
            assert (owned.start, owned.stop, owned.trained, owned.moments) == (0, parameter.numel(), False, {})
            assert owned.master.data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_model_that_does_not_learn_is_filled_by_shards_at_stage_3(world_size: int) -> None:
    """ZeRO-3 empties a parameter and keeps the rank's shard, padded to the length of rank 0's shard."""
    numel = 5
    for rank in range(world_size):
        shard_length = math.ceil(numel / world_size)
        model = nn.Linear(1, 1, bias=False)
        model.weight = nn.Parameter(torch.empty(0))
        model.weight.ds_numel, model.weight.ds_tensor = numel, torch.full((shard_length,), -1.0)
        for owned in frozen_ranges(model, 3, World(rank, world_size, rank, torch.device("cpu"))):
            assert (owned.name, owned.trained, owned.moments) == ("weight", False, {})
            owned.master.copy_(torch.arange(owned.start, owned.stop))
        first = rank * shard_length
        assert model.weight.ds_tensor.tolist() == [
            value if value < numel else -1.0 for value in range(first, first + shard_length)
        ]


def test_tables_of_a_model_name_each_parameter_once() -> None:
    model = toy_model()
    model.vision.requires_grad_(requires_grad=False)
    table = parameter_table(model)
    assert list(table) == [name for name, _ in model.named_parameters()]
    assert "head.weight" not in table
    for name, entry in table.items():
        parameter = model.get_parameter(name)
        assert entry == {"shape": list(parameter.shape), "trained": not name.startswith("vision")}
    assert tied_names(model) == {"head.weight": "decoder.embed.weight"}
    model.decoder.register_buffer("fleeting", torch.zeros(2), persistent=False)
    model.decoder.norm.register_buffer("kept", torch.ones(2))
    assert {name: values.tolist() for name, values in persistent_buffers(model).items()} == {
        "counts": [0.0, 1.0, 2.0],
        "decoder.norm.kept": [1.0, 1.0],
    }


def test_neighbours_in_the_buffer_of_gradients_are_not_copied() -> None:
    buffer = torch.arange(10.0)
    optimizer: Any = SimpleNamespace(grad_partitions_flat_buffer=buffer, flatten=torch.cat)
    undo = read_gradients_in_place(optimizer)
    joined = optimizer.flatten([buffer[2:5], buffer[5:6]])
    assert joined.tolist() == [2, 3, 4, 5]
    assert joined.data_ptr() == buffer[2:].data_ptr()
    for parts in ([buffer[5:6], buffer[2:5]], [buffer[2:5], buffer[6:7]], [buffer[2:5], torch.ones(1)]):
        copied = optimizer.flatten(parts)
        assert copied.tolist() == torch.cat(parts).tolist()
        assert copied.data_ptr() != parts[0].data_ptr()
    undo()
    assert optimizer.flatten is torch.cat


def gradients_during_an_update(world: World) -> list[bool]:
    """Return for each gradient that the optimizer reads whether it is in DeepSpeed's buffer; for ``run_ranks``."""
    found: list[bool] = []
    with closing(make_engine(world)) as engine:
        optimizer = engine.partition.optimizer

        def look(loss: float, norm: float) -> None:
            gradients = [master.grad for master in optimizer.fp32_partitioned_groups_flat if master.grad is not None]
            address = optimizer.grad_partitions_flat_buffer.untyped_storage().data_ptr()
            found.extend(gradient.untyped_storage().data_ptr() == address for gradient in gradients)

        engine.train_step(lanes_of(world, 0), look)
    return found


def test_stage_3_updates_from_the_reduced_gradients() -> None:
    ((*found,),) = run_ranks("tests.engine.test_partition:gradients_during_an_update", 1, {}, timeout=120)
    assert found
    assert all(found)
