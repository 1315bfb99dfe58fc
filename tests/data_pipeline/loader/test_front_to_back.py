"""Streaming plain tars: every sample occurs once per epoch over all lanes, in an order that depends only on the
seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataConfigError, ShardError, TooManyFaultsError
from data_pipeline.loader.front_to_back import StreamedSet, expand_shards
from data_pipeline.order.fault_lists import RunFaults
from data_pipeline.order.fault_policy import Fault, FaultConfig, FaultPolicy, ShardAction
from data_pipeline.order.state import Cursor
from data_pipeline.storage.storage import Storage


def _shards(folder: Path, sizes: list[int]) -> tuple[str, ...]:
    paths = []
    for shard, size in enumerate(sizes):
        path = folder / f"{shard:03d}-{size}.tar"
        if not path.exists():
            with webdataset.TarWriter(str(path)) as writer:
                for row in range(size):
                    writer.write({"__key__": f"{shard}-{row}", "txt": f"{shard} {row}"})
        paths.append(str(path))
    return tuple(paths)


def _open(sources: tuple[str, ...], window_size: int, seed: int = 1, **faults: object) -> StreamedSet:
    run = RunFaults(FaultConfig.model_validate(faults))
    return StreamedSet("plain", sources, seed, window_size, Storage(), run)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    window_size=st.integers(1, 5),
    num_lanes=st.integers(1, 4),
)
@example(sizes=[0, 1], window_size=1, num_lanes=4)
@pytest.mark.long
def test_over_all_lanes_each_sample_comes_once_an_epoch(
    tmp_path: Path, sizes: list[int], window_size: int, num_lanes: int
) -> None:
    shared = _open(_shards(tmp_path, sizes), window_size)
    seen: Counter[tuple[int, str]] = Counter()
    for lane in range(num_lanes):
        source, cursor = shared.lane(lane, num_lanes), Cursor()
        while True:
            place, cursor = source.resolve(cursor)
            if place.epoch >= 2:
                break
            seen[place.epoch, source.read(place.sample, place.epoch).provenance.key] += 1
    every = [f"{shard}-{row}" for shard, size in enumerate(sizes) for row in range(size)]
    assert seen == Counter({(epoch, key): 1 for epoch in range(2) for key in every})


def test_a_cursor_finds_its_place_again_and_nothing_depends_on_what_was_read(tmp_path: Path) -> None:
    shared = _open(_shards(tmp_path, [7, 5, 9]), window_size=3)
    source, cursor, visited = shared.lane(0, 2), Cursor(), []
    for _ in range(40):
        before = cursor
        place, cursor = source.resolve(cursor)
        visited.append((before, place, source.read(place.sample, place.epoch)))
    for at in (39, 3, 17, 0, 38, 22):
        cursor, place, sample = visited[at]
        fresh = shared.lane(0, 2)
        assert fresh.resolve(cursor)[0] == place
        assert source.read(place.sample, place.epoch) == sample
    orders = [[place.sample for _, place, _ in visited if place.epoch == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]
    other = _open(_shards(tmp_path, [7, 5, 9]), window_size=3, seed=2).lane(0, 2)
    assert [other.resolve(Cursor(0, 0, i))[0].sample for i in range(3)] != orders[0][:3]


def test_the_rest_of_a_damaged_shard_is_lost_and_nothing_else(tmp_path: Path) -> None:
    sources = _shards(tmp_path, [6, 6, 6, 6, 6, 6])
    Path(sources[2]).write_bytes(
        Path(sources[2]).read_bytes()[:7000]
    )  # Of 2048 bytes each; the third may lack a member.
    shared = _open(sources, window_size=4, shard=ShardAction.SKIP)
    source, cursor, policy = shared.lane(0, 1), Cursor(), FaultPolicy(shared.faults.config)
    keys, faults = [], []
    while True:
        place, cursor = source.resolve(cursor)
        if place.epoch:
            break
        result = policy.attempt(lambda place=place: source.read(place.sample), source.faults, place.sample)
        (faults if isinstance(result, Fault) else keys).append(result)
    assert sorted(sample.provenance.key for sample in keys) == sorted(
        f"{shard}-{row}" for shard in range(6) for row in range(2 if shard == 2 else 6)
    )
    (fault,) = faults
    assert fault.error.shard == sources[2]
    assert "the samples after it in the shard are lost" in fault.error.reason


def test_without_a_word_in_the_policy_a_missing_shard_ends_the_run(tmp_path: Path) -> None:
    sources = _shards(tmp_path, [3, 3])
    shared = _open(sources, window_size=4)
    Path(sources[0]).unlink()
    with pytest.raises(ShardError, match="000-3"):
        _epoch(shared)
    lost = _open(sources, window_size=4, shard=ShardAction.SKIP, max_share=0.3)
    with pytest.raises(TooManyFaultsError, match="1 of the 2 shards"):
        _epoch(lost)


def _epoch(shared: StreamedSet) -> None:
    source, cursor, policy = shared.lane(0, 1), Cursor(), FaultPolicy(shared.faults.config)
    while True:
        place, cursor = source.resolve(cursor)
        if place.epoch:
            return
        policy.attempt(lambda place=place: source.read(place.sample), source.faults, place.sample)


def test_shards_without_a_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match="none of its shards holds a sample"):
        _open(_shards(tmp_path, [0, 0]), window_size=2).lane(0, 1).resolve(Cursor())


def test_sources_are_expanded_and_checked(tmp_path: Path) -> None:
    _shards(tmp_path, [1, 1, 1])
    assert expand_shards([f"{tmp_path}/00{{0..2}}-1.tar"]) == tuple(f"{tmp_path}/00{i}-1.tar" for i in range(3))
    assert expand_shards(["pipe:cat {a,b}.tar"]) == ("pipe:cat a.tar", "pipe:cat b.tar")
    with pytest.raises(DataConfigError, match="no such file"):
        expand_shards([f"{tmp_path}/003-1.tar"])
    with pytest.raises(DataConfigError, match="named twice"):
        expand_shards([f"{tmp_path}/000-1.tar", f"{tmp_path}/00{{0..1}}-1.tar"])
