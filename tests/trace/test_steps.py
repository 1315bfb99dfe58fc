"""The samples of a step and the steps of a sample, compared with the batches that the loader yielded."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import SampleLogError
from data_pipeline.history.sample_log import LogSegment, SampleLog
from data_pipeline.loader.loader import Loader, StepBatch
from data_pipeline.order.state import Cursor, Drawn, LaneState, LoaderState, StreamPosition
from mmscale.metrics.sample_log import StepRecorder
from mmscale.optim.stages import StageConfig
from mmscale.run.config import RunConfig
from mmscale.run.sample_lookup import Evidence, SampleLookup
from tests.trace.conftest import FIRST, SECOND, WRITTEN, sound, truth, write


def test_every_step_is_what_the_loader_yielded(run: Path, steps: list[tuple[int, StepBatch]]) -> None:
    lookup = SampleLookup(run)
    written = lookup.sample_log.last_step
    by_frame = {frame.begin: lookup.catalog(frame) for frame in lookup.loaders}
    assert written == FIRST + 36
    assert lookup.sample_log.step_ranges[3:5] == [(13, 14), (15, 18)]
    for number, (stage, batch) in enumerate(steps[: written + 6], 1):
        found = lookup.samples_of(number)
        assert found.stage == ("first", "second")[stage]
        assert found.source is (Evidence.SAMPLE_LOG if number <= written else Evidence.REPLAY)
        samples = by_frame[lookup.loader_of(number).begin]
        rows = [(r.dataset, r.epoch, r.sample, *samples.where(r.dataset, r.sample)) for r in found.rows]
        if number <= written:
            assert rows == truth(batch), number
            assert len(found.skipped) == len(batch.skipped)
        lane = lookup.samples_of(number, lanes=[1])
        assert list(lane.rows) == [row for row in found.rows if row.lane == 1]


def test_a_step_is_replayed_from_the_nearest_snapshot_only(
    config: RunConfig, data: DataConfig, sound_steps: list[tuple[int, StepBatch]]
) -> None:
    config, played = config.model_copy(update={"data": sound(data)}), sound_steps
    lookup = SampleLookup(write(config, played[:WRITTEN]))
    for number in (51, 53, 60, FIRST + SECOND):
        counted: list[int] = []
        found = lookup.samples_of(number, advance=counted.append)
        assert found.replayed_from == 50
        assert len(counted) == number - 50
        assert [(r.dataset, r.epoch, r.sample) for r in found.rows] == [t[:3] for t in truth(played[number - 1][1])]
    with pytest.raises(SampleLogError, match=f"the run has the steps 1 to {FIRST + SECOND}"):
        lookup.samples_of(FIRST + SECOND + 1)
    with pytest.raises(SampleLogError, match="the lanes 0 to 2"):
        lookup.samples_of(5, lanes=[3])


def test_steps_of_every_sample(run: Path, steps: list[tuple[int, StepBatch]]) -> None:
    lookup = SampleLookup(run)
    written = lookup.sample_log.last_step
    expected: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    skipped: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for number, (_, batch) in enumerate(steps[:written], 1):
        for _, epoch, _, shard, key in truth(batch):
            expected[shard, key].add((number, epoch))
        for skip in batch.skipped:
            skipped[skip.shard, skip.key].add((number, skip.epoch))
    assert max(epoch for seen in expected.values() for _, epoch in seen) >= 2
    assert any(len(seen) > len({e for _, e in seen}) for seen in expected.values()), "no sample was split over steps"
    names = sorted(expected.keys() | skipped.keys())
    for shard, key in names[::3]:
        found = list(lookup.steps_of(shard, key))
        past = {(one.step, one.epoch) for one in found if one.source is Evidence.SAMPLE_LOG and one.skipped is None}
        left_out = {(one.step, one.epoch) for one in found if one.skipped is not None}
        assert past == expected[shard, key], (shard, key)
        assert left_out == skipped[shard, key], (shard, key)


def test_steps_to_come_are_found_and_estimated(
    config: RunConfig, data: DataConfig, sound_steps: list[tuple[int, StepBatch]]
) -> None:
    config, played = config.model_copy(update={"data": sound(data)}), sound_steps
    lookup = SampleLookup(write(config, played[:WRITTEN]))
    coming: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
    for number, (_, batch) in enumerate(played[WRITTEN:], WRITTEN + 1):
        for _, epoch, _, shard, key in truth(batch):
            coming[shard, key].add((number, epoch))
    errors = []
    for shard, key in sorted(coming)[::3]:
        until = 68
        found = [one for one in lookup.steps_of(shard, key, until=until) if one.source is Evidence.REPLAY]
        assert {(one.step, one.epoch) for one in found} == {one for one in coming[shard, key] if one[0] <= until}
        (estimate, *more) = [one for one in lookup.steps_of(shard, key) if one.source is Evidence.ESTIMATE] or [None]
        assert not more
        if estimate is not None:
            errors.append(estimate.step - min(step for step, _ in coming[shard, key]))
    assert len(errors) > 10
    assert sum(map(abs, errors)) / len(errors) < 6, errors


def test_a_search_reads_few_of_many_snapshots(
    config: RunConfig, steps: list[tuple[int, StepBatch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = SampleLookup(write(config, steps[:WRITTEN], every=1))
    assert len(lookup.sample_log.step_ranges) == WRITTEN
    read: list[int] = []
    plain = SampleLog._read_state
    monkeypatch.setattr(SampleLog, "_read_state", lambda self, number: read.append(number) or plain(self, number))
    _, _, _, shard, key = truth(steps[20][1])[0]
    found = [one for one in lookup.steps_of(shard, key) if one.source is Evidence.SAMPLE_LOG]
    assert found
    assert len(read) <= 8 * (1 + max(one.epoch for one in found) + 1)  # log2(50) per lookup, and one future epoch.


def far_state(config: RunConfig, state: LoaderState, step: int) -> LoaderState:
    """Return a state as after ``step`` steps: the cursors are far into the data, some documents wait."""
    names = state.datasets
    lanes = {}
    for lane in range(config.data.lanes):
        cursors = tuple(Cursor(epoch=40_000 + 7 * i) for i in range(len(names)))
        waiting = (Drawn(0, 39_999, lane), Drawn(1, 39_999, 5))
        lanes[lane] = LaneState(StreamPosition((step, step, 0), cursors), waiting)
    return LoaderState(state.fingerprint, step, lanes, names)


def test_step_ten_to_the_six_costs_what_step_one_costs(
    config: RunConfig, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    million = 10**6
    stages = (StageConfig(name="only", steps=2 * million),)
    endless = tuple(d.model_copy(update={"max_epochs": None}) for d in sound(data).datasets)
    config = config.model_copy(update={"stages": stages, "data": data.model_copy(update={"datasets": endless})})
    with Loader(config.data, config.media_spec, seed=config.seed) as loader:
        first = next(loader)
    state = far_state(config, first.state, million)
    with Loader(config.data, config.media_spec, seed=config.seed, state=state) as loader:
        batches = [next(loader) for _ in range(6)]
    run = write(config, [(0, first)], every=1)
    recorder = StepRecorder(million - 1, 0)
    recorder.add(StepBatch(million - 1, (), (), state, 0, 0, drawn={}), [])
    segment = recorder.pop_segment()
    (run / "sample_log" / segment.name()).write_bytes(segment.to_bytes())
    for number in range(2, 4000):  # The contents of these files must not be read.
        (run / "sample_log" / f"steps-{number:010d}-{number:010d}.samples").touch()

    read: list[str] = []
    plain = LogSegment.from_bytes
    monkeypatch.setattr(LogSegment, "from_bytes", lambda data, what="": read.append(what) or plain(data, what))
    lookup = SampleLookup(run)
    for ahead, batch in enumerate(batches, 1):
        counted: list[int] = []
        found = lookup.samples_of(million + ahead, advance=counted.append)
        assert len(counted) == ahead
        assert [(r.dataset, r.epoch, r.sample) for r in found.rows] == [t[:3] for t in truth(batch)]
    assert len(read) == 1
    assert min(row.epoch for row in found.rows) >= 39_999
