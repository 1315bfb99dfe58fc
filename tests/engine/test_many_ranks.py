"""The paths of large runs on a few real ranks: a tree instead of a ring, and connections made when they are used."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale import dist
from mmscale.dist import (
    World,
    all_equal,
    all_reduce_max,
    all_reduce_sum_list,
    any_rank,
    broadcast_bytes,
    gather_bytes,
    gather_numbers,
    lowest_rank_error,
    num_messages,
)

RANKS = 5


def exchange(world: World) -> dict[str, Any]:
    dist._MOST_IN_A_RING = 1
    rank = world.rank
    return {
        "sums": all_reduce_sum_list(world, [float(rank), 2.0**rank, 0.5]),
        "max": [all_reduce_max(world, float(value)) for value in (rank, -rank, 7)],
        "any": [any_rank(world, rank == chosen) for chosen in (0, 3, RANKS)],
        "numbers": gather_numbers(world, 10.0 * rank),
        "equal": [all_equal(world, b"same digest"), all_equal(world, bytes([rank]) * 9)],
        "bytes": [part.decode() for part in gather_bytes(world, b"x" * rank)],
        "text": broadcast_bytes(world, f"from {rank}".encode()).decode(),
        "errors": [
            lowest_rank_error(world, None),
            lowest_rank_error(world, f"disk {rank} is full" if rank in (2, 4) else None),
            lowest_rank_error(world, "é" * 2000 if rank == 3 else None),
        ],
    }


@pytest.mark.dist
def test_a_tree_gives_every_rank_the_same_values() -> None:
    from tests.engine.ranks import run_ranks

    environment = {"TORCH_GLOO_LAZY_INIT": "1"}
    answers = run_ranks("tests.engine.test_many_ranks:exchange", RANKS, environment=environment)
    for rank, answer in enumerate(answers):
        assert answer["sums"] == [10.0, 31.0, 2.5]
        assert answer["max"] == [4.0, 0.0, 7.0]
        assert answer["any"] == [True, True, False]
        assert answer["numbers"] == [0.0, 10.0, 20.0, 30.0, 40.0]
        assert answer["equal"] == [True, False]
        assert answer["bytes"] == (["", "x", "xx", "xxx", "xxxx"] if rank == 0 else [])
        assert answer["text"] == "from 0"
        assert answer["errors"][:2] == [None, "rank 2: disk 2 is full"]
        assert answer["errors"][2] == "rank 3: " + "é" * 512


def test_messages_of_a_large_run_grow_with_the_logarithm() -> None:
    assert (num_messages(64), num_messages(65), num_messages(8000)) == (126, 14, 26)
