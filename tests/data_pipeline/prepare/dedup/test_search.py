"""The search finds the same pairs as a comparison of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.prepare.dedup import search
from data_pipeline.prepare.dedup.search import BlockPlan, NearWork, equal_rows, greedy

MASK = (1 << 64) - 1
words = st.integers(0, MASK)


@st.composite
def clustered(draw: st.DrawFn) -> list[int]:
    """Draw distinct hashes, many of which differ from another one in a few bits."""
    found = set(draw(st.lists(words, min_size=1, max_size=6)))
    for _ in range(draw(st.integers(0, 40))):
        value = draw(st.sampled_from(sorted(found)))
        for bit in draw(st.lists(st.integers(0, 63), min_size=1, max_size=7)):
            value ^= 1 << bit
        found.add(value)
    return draw(st.permutations(sorted(found)))


@pytest.fixture
def small_parts() -> Iterator[None]:
    """Reduce the part size to a few rows."""
    before = search.ROWS_AT_ONCE, search._COMPARED_AT_ONCE
    search.ROWS_AT_ONCE, search._COMPARED_AT_ONCE = 5, 4
    yield
    search.ROWS_AT_ONCE, search._COMPARED_AT_ONCE = before


def near_pairs(folder: Path, values: list[int], plan: BlockPlan, distance: int) -> list[tuple[int, int]]:
    path = folder / "values.npy"
    np.save(path, np.array(values, np.uint64))
    work = NearWork(path, plan, distance)
    pieces = [piece for task in work.tasks(len(values)) for piece in work(task)]
    return sorted((later, earlier) for piece in pieces for later, earlier in piece.pairs.tolist())


def all_pairs(values: list[int], distance: int) -> list[tuple[int, int]]:
    return [
        (later, earlier)
        for later in range(len(values))
        for earlier in range(later)
        if bin(values[later] ^ values[earlier]).count("1") <= distance
    ]


same_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60, deadline=None
)


@same_folder
@given(values=clustered(), distance=st.integers(1, 16), equal=st.integers(1, 3))
def test_every_near_pair_is_found_once(tmp_path: Path, values: list[int], distance: int, equal: int) -> None:
    equal = equal if distance <= 6 else 1
    assert near_pairs(tmp_path, values, BlockPlan(distance + equal, equal), distance) == all_pairs(values, distance)


@same_folder
@given(values=clustered(), distance=st.integers(1, 5))
@pytest.mark.usefixtures("small_parts")
@pytest.mark.long
def test_parts_change_nothing(tmp_path: Path, values: list[int], distance: int) -> None:
    plan = BlockPlan(distance + 2, 2)
    assert near_pairs(tmp_path, values, plan, distance) == all_pairs(values, distance)


@given(values=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60), seed=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@pytest.mark.parametrize("parts", ["one", "many"])
def test_equal_rows_are_found_by_a_dictionary_too(
    request: pytest.FixtureRequest, parts: str, values: list[Any], seed: int
) -> None:
    if parts == "many":
        request.getfixturevalue("small_parts")
    keys = np.array(values, np.uint64).reshape(-1, 2)
    rows = np.random.default_rng(seed).permutation(len(values)).astype(np.int64)
    later, first = equal_rows(keys, rows)
    met: dict[tuple[int, int], int] = {}
    expected = {}
    for place, row in enumerate(rows.tolist()):
        earlier = met.setdefault(values[row], place)
        if earlier != place:
            expected[place] = earlier
    assert dict(zip(later.tolist(), first.tolist(), strict=True)) == expected


@given(
    pairs=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 24)).filter(lambda p: p[0] > p[1]), max_size=80),
    protected=st.integers(0, 8),
)
def test_every_removed_position_is_near_a_kept_one(pairs: list[tuple[int, int]], protected: int) -> None:
    gone, near = greedy(np.array(pairs, np.int64).reshape(-1, 2), protected)
    left_out = dict(zip(gone.tolist(), near.tolist(), strict=True))
    assert not set(left_out.values()) & set(left_out)
    assert all((later, earlier) in pairs for later, earlier in left_out.items())
    assert all(later >= protected for later in left_out)
    for later, earlier in pairs:  # No two near positions are kept, except protected ones.
        assert later in left_out or earlier in left_out or later < protected


def test_more_hashes_are_cut_into_longer_keys() -> None:
    equal = [BlockPlan.of(10**power, 4).num_equal for power in (3, 6, 9, 10)]
    assert equal == sorted(equal)
    assert equal[0] == 1
    assert equal[2] >= 2
    for plan in (BlockPlan(7, 3), BlockPlan(17, 1)):
        assert sum(plan.blocks) == MASK
