"""Single samples: the loader's order for any ranks and threads, and states that any number of ranks can load."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data_pipeline import OrderedSamples, open_samples
from data_pipeline.errors import DataConfigError, SampleError, StateError
from data_pipeline.loader.sample_source import dataset_seed
from data_pipeline.order.fault_policy import FaultConfig
from data_pipeline.order.lanes import LaneOrder, OrderConfig
from data_pipeline.order.state import Cursor
from data_pipeline.sample import Sample

NUM_SAMPLES, LANES = 41, 5
ORDER = OrderConfig(block_size=4, window_blocks=2)


@pytest.fixture
def manifest(write_set: Callable[..., Path]) -> Path:
    texts = [{"txt": f"text {number}".encode()} for number in range(NUM_SAMPLES)]
    return write_set("texts", texts)


def opened(manifest: Path, rank: int = 0, world_size: int = 1, workers: int = 0) -> OrderedSamples[Sample]:
    return open_samples(
        manifest, seed=3, rank=rank, world_size=world_size, workers=workers, lanes=LANES, order=ORDER, max_epochs=2
    )


def places(samples: Iterator[Sample]) -> list[tuple[int, int]]:
    return [(sample.provenance.epoch, sample.provenance.index) for sample in samples]


def rows(manifest: Path) -> list[list[tuple[int, int]]]:
    """Return the samples of each lane over two epochs, from ``LaneOrder``."""
    lanes = []
    for lane in range(LANES):
        order = LaneOrder(NUM_SAMPLES, 4, 2, dataset_seed(3, "samples"), lane, LANES)
        cursor, found = Cursor(), list[tuple[int, int]]()
        while (turn := order.resolve(cursor))[0].epoch < 2:
            found.append((turn[0].epoch, turn[0].sample))
            cursor = turn[1]
        lanes.append(found)
    return lanes


def in_turn(lanes: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    longest = max(map(len, lanes))
    return [lane[row] for row in range(longest) for lane in lanes if row < len(lane)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9])
def test_the_order_is_that_of_the_lanes_in_turn(manifest: Path, workers: int) -> None:
    expected = in_turn(rows(manifest))
    samples = opened(manifest, workers=workers)
    assert places(iter(samples)) == expected
    assert sorted(expected) == sorted((epoch, index) for epoch in range(2) for index in range(NUM_SAMPLES))
    assert list(samples) == [], "what is used up stays used up"
    assert not [thread for thread in threading.enumerate() if thread.name == "samples"]


def test_a_rank_has_its_lanes(manifest: Path) -> None:
    lanes = rows(manifest)
    for world_size in (2, 3, 5):
        for rank in range(world_size):
            got = places(iter(opened(manifest, rank, world_size, workers=rank % 3)))
            assert got == in_turn(lanes[rank::world_size])


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 37, 81, 82])
def test_a_state_goes_on_with_other_threads(manifest: Path, taken: int) -> None:
    expected = in_turn(rows(manifest))
    before = opened(manifest, workers=2)
    assert places(islice(before, taken)) == expected[:taken]
    state = json.loads(json.dumps(before.state_dict()))
    for workers in (0, 1, 3):
        after = opened(manifest, workers=workers)
        after.load_state_dict(state)
        assert places(iter(after)) == expected[taken:]
    assert places(iter(before)) == expected[taken:], "the same object goes on too"


@pytest.mark.parametrize(("old", "new"), [(2, 1), (2, 3), (5, 2), (1, 4)])
def test_states_of_all_ranks_go_on_at_other_ranks(manifest: Path, old: int, new: int) -> None:
    lanes = rows(manifest)
    ranks = [opened(manifest, rank, old) for rank in range(old)]
    seen = [place for rank in ranks for place in places(islice(rank, 7))]
    states = [rank.state_dict() for rank in ranks]
    rest = []
    for rank in range(new):
        samples = opened(manifest, rank, new, workers=2)
        samples.load_state_dict(states)
        got = places(iter(samples))
        for lane in lanes[rank::new]:
            assert [place for place in got if place in lane] == [place for place in lane if place not in seen]
        rest += got
    assert sorted(seen + rest) == sorted(place for lane in lanes for place in lane)


def test_apply_runs_on_each_sample_and_its_faults_are_left_out(manifest: Path) -> None:
    def length(sample: Sample) -> int:
        if sample.provenance.index == 17:
            raise SampleError("seventeen")
        return sample.provenance.index

    for workers in (0, 2):
        samples = open_samples(manifest, seed=3, apply=length, workers=workers, lanes=LANES, max_epochs=1)
        assert sorted(samples) == [index for index in range(NUM_SAMPLES) if index != 17]
        (skipped,) = samples.pop_skipped()
        assert (skipped.index, skipped.epoch, skipped.reason) == (17, 0, "seventeen")
        strict = open_samples(
            manifest,
            seed=3,
            apply=length,
            workers=workers,
            lanes=LANES,
            faults=FaultConfig.model_validate({"on_error": "fail"}),
        )
        with pytest.raises(SampleError, match="seventeen"):
            list(islice(strict, 2 * NUM_SAMPLES))


def test_a_state_is_of_its_data(manifest: Path) -> None:
    samples = opened(manifest)
    list(islice(samples, 3))
    other = open_samples(manifest, seed=4, lanes=LANES, order=ORDER, max_epochs=2)
    with pytest.raises(StateError, match="changed since: seed"):
        other.load_state_dict(samples.state_dict())
    with pytest.raises(StateError, match="no loader state"):
        samples.load_state_dict({"lanes": 3})


def test_what_cannot_work_is_said(manifest: Path) -> None:
    with pytest.raises(DataConfigError, match="rank 0 of 6 ranks, 5 lanes"):
        opened(manifest, world_size=6)
    wrapped = DataLoader(opened(manifest), batch_size=None, num_workers=1)
    with pytest.raises(DataConfigError, match="read by threads"):
        next(iter(wrapped))
