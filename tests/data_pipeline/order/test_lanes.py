"""The order: every sample once per epoch over all lanes, random access to any cursor, and the inverse."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataConfigError
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor, SamplePosition

SEEDS = st.integers(0, 2**64 - 1)


def walk(order: LaneOrder, epochs: int) -> list[SamplePosition]:
    """Return the positions of one lane in order, until ``epochs`` are over."""
    places: list[SamplePosition] = []
    cursor = Cursor()
    while True:
        place, cursor = order.resolve(cursor)
        if place.epoch >= epochs:
            return places
        places.append(place)


# Recorded with the first version, which resolved single samples without numpy: old runs must still resume.
GOLDEN = {
    ((1, 1, 1, 0, 0, 1), Cursor(), 9): "3d8309270d250abc",
    ((1, 16, 8, 5, 2, 7), Cursor(), 9): "df6728b2ee66f992",
    ((5, 2, 3, 2**64 - 1, 3, 4), Cursor(), 40): "501d699f3ab389a8",
    ((1000, 16, 8, 1, 0, 4), Cursor(), 600): "d911fe5247d3e496",
    ((1000, 7, 3, 2, 3, 5), Cursor(4, 1, 2), 600): "689aa34af22def4c",
    ((4097, 1, 1, 3, 1, 2), Cursor(), 3000): "60332abc71086bbf",
    ((99991, 64, 100, 4, 6, 13), Cursor(2, 0, 0), 20000): "a2ff2873b7ddf1cb",
    ((80001, 10000, 8, 5, 0, 1), Cursor(), 90000): "7496f1fb6ae86320",
    ((10**10, 16, 8, 6, 11, 4096), Cursor(5, 2000, 7), 3000): "a5648534b5a9420d",
    ((10**10, 10000, 8, 7, 5, 64), Cursor(3, 1000, 70000), 30000): "ef4c55b44e249c50",
    ((10**12, 1, 65536, 8, 1, 3), Cursor(1, 9, 65000), 2000): "b65392bd062219a6",
}


@pytest.mark.parametrize(("case", "expected"), GOLDEN.items(), ids=str)
def test_the_order_is_the_same_in_every_process_and_version(
    case: tuple[tuple[int, int, int, int, int, int], Cursor, int], expected: str
) -> None:
    arguments, cursor, count = case
    order, digest = LaneOrder(*arguments), hashlib.sha256()
    for _ in range(count):
        place, cursor = order.resolve(cursor)
        digest.update(f"{place.sample},{place.epoch};{tuple(cursor)};".encode())
    assert digest.hexdigest()[:16] == expected


@given(
    num_samples=st.integers(1, 200),
    block_size=st.integers(1, 40),
    window_blocks=st.integers(1, 9),
    num_lanes=st.integers(1, 12),
    world_size=st.integers(1, 7),
    workers=st.integers(1, 3),
    seed=SEEDS,
)
def test_all_ranks_and_workers_together_see_every_sample_once_an_epoch(
    num_samples: int, block_size: int, window_blocks: int, num_lanes: int, world_size: int, workers: int, seed: int
) -> None:
    seen: Counter[SamplePosition] = Counter()
    for rank in range(world_size):
        for worker in range(workers):
            for lane in range(rank, num_lanes, world_size)[worker::workers]:
                seen.update(walk(LaneOrder(num_samples, block_size, window_blocks, seed, lane, num_lanes), 3))
    assert seen == Counter(SamplePosition(sample, epoch) for epoch in range(3) for sample in range(num_samples))


@settings(max_examples=20)
@given(
    num_samples=st.integers(1100, 4000),
    block_size=st.integers(300, 5000),
    window_blocks=st.integers(1, 3),
    num_lanes=st.integers(1, 3),
    seed=SEEDS,
)
def test_windows_larger_than_what_is_worked_out_at_once_lose_nothing(
    num_samples: int, block_size: int, window_blocks: int, num_lanes: int, seed: int
) -> None:
    orders = [LaneOrder(num_samples, block_size, window_blocks, seed, lane, num_lanes) for lane in range(num_lanes)]
    seen = Counter(place.sample for order in orders for place in walk(order, 1))
    assert seen == Counter(range(num_samples))


@given(num_samples=st.integers(1, 500), num_lanes=st.integers(1, 7), seed=SEEDS)
def test_any_cursor_is_found_without_those_before_it(num_samples: int, num_lanes: int, seed: int) -> None:
    order = LaneOrder(num_samples, 8, 3, seed, 0, num_lanes)
    cursor, walked = Cursor(), []
    for _ in range(100):
        place, after = order.resolve(cursor)
        walked.append((cursor, place))
        cursor = after
    fresh = LaneOrder(num_samples, 8, 3, seed, 0, num_lanes)
    assert all(fresh.resolve(cursor)[0] == place for cursor, place in reversed(walked))


@settings(max_examples=40)
@given(num_samples=st.integers(1, 3000), block_size=st.integers(1, 700), num_lanes=st.integers(1, 3), data=st.data())
def test_a_lane_that_jumps_to_and_fro_gives_what_a_fresh_one_gives(
    num_samples: int, block_size: int, num_lanes: int, data: st.DataObject
) -> None:
    lane = data.draw(st.integers(0, num_lanes - 1))
    order = LaneOrder(num_samples, block_size, 2, 5, lane, num_lanes)
    offsets = st.one_of(st.integers(0, 3), st.integers(505, 520), st.integers(1020, 1030))
    for jump in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), offsets), max_size=9)):
        epoch, window, offset = jump
        for cursor in (Cursor(epoch, window, offset), Cursor(epoch, window, max(offset - 1, 0))):
            assert order.resolve(cursor) == LaneOrder(num_samples, block_size, 2, 5, lane, num_lanes).resolve(cursor)


def test_a_lane_goes_back_over_the_end_of_what_is_worked_out_at_once() -> None:
    walked = walk(LaneOrder(3000, 3000, 2, 5, 0, 1), 1)
    order = LaneOrder(3000, 3000, 2, 5, 0, 1)
    for offset in (512, 511, 1024, 1023, 0, 2999):
        assert order.resolve(Cursor(0, 0, offset))[0] == walked[offset]


@settings(max_examples=40)
@given(
    num_samples=st.integers(1, 60),
    block_size=st.integers(1, 9),
    window_blocks=st.integers(1, 4),
    lanes=st.sampled_from([(0, 1), (0, 3), (2, 3), (6, 9)]),
    skip=st.integers(0, 40),
)
def test_the_blocks_of_a_cursor_hold_what_its_window_and_the_next_visit(
    num_samples: int, block_size: int, window_blocks: int, lanes: tuple[int, int], skip: int
) -> None:
    order = LaneOrder(num_samples, block_size, window_blocks, 5, *lanes)
    cursor = order.resolve(Cursor())[1]
    for _ in range(skip):
        cursor = order.resolve(cursor)[1]
    ahead, windows = Cursor(cursor.epoch, cursor.window, 0), list[Cursor]()
    visited: list[list[int]] = []
    while len(windows) < 3:
        place, after = order.resolve(ahead)
        if not windows or after[:2] != windows[-1][:2]:
            windows.append(after)
            visited.append([])
        visited[-1].append(place.sample)
        ahead = after
    blocks = order.blocks(cursor)
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    assert min(map(len, blocks)) >= 1
    count = next(i for i in range(len(blocks)) if sum(map(len, blocks[: i + 1])) == len(visited[0])) + 1
    for part, samples in ((blocks[:count], visited[0]), (blocks[count:], visited[1])):
        assert sorted(sample for block in part for sample in block) == sorted(samples)
    assert order.blocks(Cursor(cursor.epoch, 10**6, 0)) == []


@given(
    num_samples=st.one_of(st.integers(1, 5000), st.integers(1, 10**13)),
    block_size=st.one_of(st.integers(1, 40), st.integers(1, 20_000)),
    window_blocks=st.integers(1, 80),
    num_lanes=st.integers(1, 5000),
    seed=SEEDS,
    epoch=st.integers(0, 10**5),
    data=st.data(),
)
def test_find_goes_back_from_a_sample_to_its_cursor(
    num_samples: int, block_size: int, window_blocks: int, num_lanes: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    sample = data.draw(st.integers(0, num_samples - 1))
    asked = LaneOrder(num_samples, block_size, window_blocks, seed, num_lanes - 1, num_lanes)
    lane, cursor = asked.find(sample, epoch)
    order = LaneOrder(num_samples, block_size, window_blocks, seed, lane, num_lanes)
    place, after = order.resolve(cursor)
    assert place == SamplePosition(sample, epoch)
    assert after == Cursor(epoch, cursor.window, cursor.offset + 1)
    assert order.find(sample, epoch) == (lane, cursor)


def test_find_looks_into_the_window_of_the_samples_lane_and_not_into_its_own() -> None:
    orders = [LaneOrder(60, 2, 3, seed=1, lane=lane, num_lanes=4) for lane in range(4)]
    found = {sample: LaneOrder(60, 2, 3, seed=1, lane=0, num_lanes=4).find(sample, 1) for sample in range(60)}
    for cursor in (Cursor(1, 0, 0), Cursor(1, 1, 3)):
        for order in orders:
            order.resolve(cursor)  # The order caches this window.
            assert {sample: order.find(sample, 1) for sample in range(60)} == found


def test_an_offset_far_into_a_large_window_is_found() -> None:
    order = LaneOrder(400_000, 4000, 100, seed=1, lane=0, num_lanes=1)
    for offset in (0, 511, 512, 270_000, 399_999):
        place, _ = LaneOrder(400_000, 4000, 100, seed=1, lane=0, num_lanes=1).resolve(Cursor(0, 0, offset))
        assert order.find(place.sample, 0) == (0, Cursor(0, 0, offset))


def test_find_refuses_samples_that_do_not_exist() -> None:
    for sample, epoch in ((-1, 0), (10, 0), (0, -1)):
        with pytest.raises(IndexError, match=f"sample {sample} of 10, epoch {epoch}"):
            LaneOrder(10, 2, 2, 1, 0, 1).find(sample, epoch)


def test_a_lane_without_a_block_for_many_epochs_goes_on_where_it_has_one() -> None:
    place, after = LaneOrder(3, 16, 8, seed=1, lane=99_999, num_lanes=100_000).resolve(Cursor())
    assert place.epoch == 99_999
    assert after == Cursor(99_999, 0, 1)


def test_a_place_of_ten_billion_samples_needs_no_list() -> None:
    order = LaneOrder(10**10, 64, 16, seed=3, lane=11, num_lanes=4096)
    place, after = order.resolve(Cursor(5, 2000, 700))
    assert 0 <= place.sample < 10**10
    assert place.epoch == 5
    assert after == Cursor(5, 2000, 701)


def test_a_block_is_read_within_one_window() -> None:
    order = LaneOrder(1000, block_size=10, window_blocks=2, seed=1, lane=0, num_lanes=1)
    places = walk(order, 1)
    for i in range(0, 1000, 20):
        blocks = {place.sample // 10 for place in places[i : i + 20]}
        assert len(blocks) == 2
    assert [place.sample for place in places] != sorted(place.sample for place in places)


@given(num_samples=st.integers(600, 2000), block_size=st.integers(1, 4), seed=SEEDS)
@settings(max_examples=25, derandomize=True)
def test_epochs_are_shuffled_independently(num_samples: int, block_size: int, seed: int) -> None:
    """The positions of a sample in two epochs are not correlated."""
    positions = np.empty((3, num_samples))
    for i, place in enumerate(walk(LaneOrder(num_samples, block_size, 16, seed, 0, 1), 3)):
        positions[place.epoch, place.sample] = i
    stored = np.arange(num_samples)
    # Blocks are permuted as a whole, so a random correlation has a deviation of 1 / sqrt(blocks); 4.5: 1 in 147,000.
    chance = 4.5 / np.sqrt(num_samples / block_size)
    correlations = np.asarray(np.corrcoef(np.vstack([stored, positions])))
    assert np.abs(correlations[np.triu_indices(4, 1)]).max() < chance


def test_empty_sets_and_lanes_outside_are_refused() -> None:
    with pytest.raises(DataConfigError, match="manifest empty"):
        LaneOrder(0, 1, 1, 1, 0, 1)
    for lane in (4, -1):
        with pytest.raises(DataConfigError, match=f"lane {lane} of 4"):
            LaneOrder(10, 1, 1, 1, lane, 4)
