"""Which samples a step of a run had, and which steps a sample had: from the run folder and the manifests.

    step   --ledger--> rows;  not written down (yet): replayed from the nearest snapshot
    sample --order's inverse--> lane and cursor of each epoch --search of the snapshots--> segment --> rows
                                                              --replay until a step, or estimate--> future

Nothing here depends on how many steps a run has, but for the future: a step that lies k steps behind the last snapshot
costs k steps of measuring. Not for: what the samples look like (``data_pipeline.history.sample_lookup``).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.errors import LedgerError
from data_pipeline.history.replay import Replay
from data_pipeline.history.sample_log import Ledger, Row
from data_pipeline.history.sample_lookup import Samples
from data_pipeline.history.sample_steps import Whereabouts, draws_per_step
from data_pipeline.loader.front_to_back import commands
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import Drawn
from mmscale.bad_steps.roll_back import RollBack, in_force, read_roll_backs
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig
from mmscale.run.folder import BAD_STEPS, CONFIG, LEDGER

Advance = Callable[[int], object]
"""Told of each replayed step."""


class Source(str, Enum):
    """How it is known."""

    LEDGER = "ledger"
    """Written down when the step was done."""
    REPLAY = "replay"
    """Computed again from a snapshot, or ahead of time: true unless an image turns out to be damaged."""
    ESTIMATE = "estimate"
    """From the number of samples that come before it and the pace of the last steps."""


@dataclass(frozen=True)
class StepTrace:
    """One step.

    Attributes:
        stage: Its stage's name.
        source: ``ledger`` or ``replay``.
        replayed_from: Step of the snapshot that a replay began at.
        skipped: What was left out while the step was made.
    """

    step: int
    stage: str
    source: Source
    rows: tuple[Row, ...]
    skipped: tuple[Mapping[str, Any], ...] = ()
    replayed_from: int | None = None


@dataclass(frozen=True)
class Sighting:
    """A step that a sample was or will be in; ``row`` is None where only step and lane are known."""

    step: int
    dataset: str
    epoch: int
    lane: int
    source: Source
    row: Row | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Frame:
    """Steps that are fed by one loader.

    Attributes:
        begin: Steps of the run that were done before its first.
        end: Its last step, as the configuration plans it.
        spec: What the model of these steps takes.
    """

    begin: int
    end: int
    data: DataConfig
    spec: MediaSpec


def frames(config: RunConfig) -> list[Frame]:
    """The loaders of a run, one after the other: stages may share one (``RunConfig.continues``)."""
    found: list[Frame] = []
    done = 0
    for number, stage in enumerate(config.stages):
        begin = found.pop().begin if config.continues(number) else done
        done += stage.steps
        found.append(Frame(begin, done, config.stage_data(number), config.stage_media(number)))
    return found


class RunTrace:
    """The ledger of a run with the configuration that it was written under.

    Args:
        run: A run folder.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, run: Path) -> None:
        if not (run / CONFIG).is_file():
            raise ConfigError(f"{run}: no run folder, it holds no {CONFIG}")
        self.config = load(run / CONFIG, [], RunConfig).value
        self.ledger = Ledger(run / LEDGER)
        self.frames = frames(self.config)
        self._roll_backs = in_force(read_roll_backs(run / BAD_STEPS))
        self._forget_undone()

    def _forget_undone(self) -> None:
        """Leaves out segments of steps that were rolled back, if the run was killed before it removed them."""
        ledger, last = self.ledger, self._roll_back(self.ledger.last_step)
        if last is None or last.to_step == ledger.last_step:
            return
        if ledger.state(len(ledger.spans) - 1).step <= last.position.step:
            ledger.spans = [span for span in ledger.spans if span[1] <= last.to_step]

    def _roll_back(self, step: int) -> RollBack | None:
        """The last roll back to ``step`` or before."""
        return next((entry for entry in reversed(self._roll_backs) if entry.to_step <= step), None)

    def frame(self, step: int) -> Frame:
        """The frame of a step.

        Raises:
            LedgerError: the run has no such step.
        """
        found = [frame for frame in self.frames if frame.begin < step <= frame.end]
        if not found:
            raise LedgerError(f"no step {step}: the run has the steps 1 to {self.frames[-1].end}")
        return found[0]

    def samples(self, frame: Frame) -> Samples:
        """The samples of a frame's data sets, as the ledger's last state of it knows them."""
        numbers = self.segments(frame)
        state = self.ledger.state(numbers[-1]) if numbers else None
        return Samples(frame.data, frame.spec, self.config.seed, state)

    def _check_order(self, frame: Frame) -> None:
        """Whether the order that the frame's steps were done in is that of the configuration.

        Raises:
            LedgerError: it is not.
        """
        numbers = self.segments(frame)
        parts = {"seed": self.config.seed, "lanes": frame.data.lanes, "order": frame.data.order.model_dump(mode="json")}
        state = self.ledger.state(numbers[-1]) if numbers else None
        changed = [] if state is None else state.changed(parts)
        names = [dataset.name for dataset in frame.data.datasets]
        changed += [f"no data set {name}" for name in (state.datasets if state else ()) if name not in names]
        if changed:
            raise LedgerError(f"config.yaml has other values than these steps were done with: {', '.join(changed)}")

    def stage_name(self, step: int) -> str:
        """Name of the stage of a step, by the configuration."""
        for stage in self.config.stages:
            if step <= stage.steps:
                return stage.name
            step -= stage.steps
        return self.config.stages[-1].name

    def step(self, step: int, lanes: Collection[int] | None = None, advance: Advance = lambda count: None) -> StepTrace:
        """The rows of a step.

        Args:
            step: From 1, as in ``metrics.jsonl``.
            lanes: Only these; None for all.
            advance: Told of each step that is replayed.

        Raises:
            LedgerError: the run has no such step or lane, or the segment is damaged.
            DataPipelineError: a replay lacks a shard, or the data block was changed since.
        """
        frame = self.frame(step)
        outside = [lane for lane in lanes or () if not 0 <= lane < frame.data.lanes]
        if outside:
            raise LedgerError(f"no lane {outside[0]}: step {step} has the lanes 0 to {frame.data.lanes - 1}")
        number = self.ledger.number_of(step)
        if number is None:
            return self._replayed(frame, step, lanes, advance)
        segment = self.ledger.segment(number)
        skipped = (record for record in segment.skipped if record["step"] == step)
        return StepTrace(
            step,
            self.stage_name(step),
            Source.LEDGER,
            tuple(segment.of_step(step, lanes)),
            tuple(record for record in skipped if lanes is None or record["lane"] in lanes),
        )

    def _replayed(self, frame: Frame, step: int, lanes: Collection[int] | None, advance: Advance) -> StepTrace:
        start, replay = self.replay(frame, step - 1, lanes)
        packs: dict[int, tuple[Drawn, ...]] = {}
        skipped: tuple[Skipped, ...] = ()
        for _ in range(start, step):
            packs, skipped = replay.next_step(), replay.take_skipped()
            advance(1)
        names = [dataset.name for dataset in frame.data.datasets]
        rows = [
            _row(replay, names, step, lane, place, drawn)
            for lane, pack in packs.items()
            for place, drawn in enumerate(pack)
        ]
        records = tuple({"step": step, **skip.record()} for skip in skipped)
        return StepTrace(step, self.stage_name(step), Source.REPLAY, tuple(rows), records, start)

    def replay(self, frame: Frame, step: int, lanes: Collection[int] | None) -> tuple[int, Replay]:
        """A replay from the last snapshot of a frame at ``step`` or before, and the step of that snapshot.

        Behind a roll back the data are not those of the steps' numbers; it is a snapshot too.
        """
        piped = [dataset.name for dataset in frame.data.datasets if dataset.code or commands(dataset.shards)]
        if piped:
            raise LedgerError(f"not written down, and a trace does not run the code that {piped[0]} comes from")
        snapshot = self.ledger.snapshot(step)
        spec, seed = frame.spec, self.config.seed
        entry = self._roll_back(step)
        if entry is not None and entry.stage_begin < frame.begin:
            entry = None
        if entry is not None and (snapshot is None or snapshot.last <= entry.to_step):
            return entry.to_step, Replay(frame.data, spec, seed, entry.position, lanes)
        if snapshot is None or snapshot.last <= frame.begin:
            return frame.begin, Replay(frame.data, spec, seed, None, lanes)
        left_out = 0 if entry is None else entry.position.step - (entry.to_step - frame.begin)
        if snapshot.state.step != snapshot.last - frame.begin + left_out:
            raise LedgerError(
                f"the stages in config.yaml were changed since step {snapshot.last}: by them its data began at step "
                f"{frame.begin}, by the ledger at {snapshot.last - snapshot.state.step}"
            )
        return snapshot.last, Replay(frame.data, spec, seed, snapshot.state, lanes)

    def sample(
        self, shard: str, key: str, until: int | None = None, advance: Advance = lambda count: None
    ) -> Iterator[Sighting]:
        """The steps of a sample: those that are written down, then those to come.

        Args:
            shard: Path or name of the tar.
            key: Key of the sample in it.
            until: Replay up to this step and tell the steps exactly; None estimates the next one.
            advance: Told of each step that is replayed.

        Raises:
            LedgerError: no data set of the run has this sample.
            DataPipelineError: as ``step``.
        """
        seen = False
        for frame in self.frames:
            self._check_order(frame)
            samples = self.samples(frame)
            for dataset, sample in samples.find(shard, key):
                seen = True
                where = Whereabouts(frame.data, self.config.seed, dataset, sample, samples.sizes)
                sought = _Sought(self, frame, where)
                yield from sought.past()
                yield from sought.next() if until is None else sought.until(until, advance)
            for dataset, sample in samples.find_streamed(shard, key):
                seen = True
                if until is not None:
                    raise LedgerError(
                        f"{dataset} is streamed without an index: its coming steps are unknown; no --until"
                    )
                yield from self._scan(frame, dataset, sample)
        if not seen:
            raise LedgerError(f"no data set of this run has a shard {shard} with the key {key}")

    def segments(self, frame: Frame) -> range:
        """Numbers of the ledger's segments that belong to a frame."""
        spans = self.ledger.spans
        first = bisect.bisect_left(spans, (frame.begin + 1, 0))
        return range(first, bisect.bisect_right(spans, (frame.end, frame.end)))

    def _scan(self, frame: Frame, dataset: str, sample: int) -> Iterator[Sighting]:
        """Every step that is written down, by a look at each: a set without an index has no inverse of its order."""
        for number in self.segments(frame):
            segment = self.ledger.segment(number)
            for record in segment.skipped:
                if (record["dataset"], record["index"]) == (dataset, sample):
                    place = (record["step"], dataset, record["epoch"], record["lane"])
                    yield Sighting(*place, Source.LEDGER, skipped=record["reason"])
            for row in segment.of_sample(dataset, sample):
                yield Sighting(row.step, dataset, row.epoch, row.lane, Source.LEDGER, row)


class _Sought:
    """A sample in one frame: what is written down, then what is to come."""

    def __init__(self, trace: RunTrace, frame: Frame, where: Whereabouts) -> None:
        self._trace, self._frame, self._where = trace, frame, where
        self._numbers = trace.segments(frame)
        self._done: set[int] = set()
        """Epochs of which nothing is to come."""

    def past(self) -> Iterator[Sighting]:
        """What the ledger holds."""
        for found in self._where.past(self._trace.ledger, self._numbers):
            if not found.waits:
                self._done.add(found.epoch)
            for record in found.skipped:
                yield self._sighting(record["step"], found.epoch, found.lane, Source.LEDGER, skipped=record["reason"])
            for row in found.rows:
                yield self._sighting(row.step, found.epoch, found.lane, Source.LEDGER, row)

    def _sighting(
        self, step: int, epoch: int, lane: int, source: Source, row: Row | None = None, skipped: str | None = None
    ) -> Sighting:
        return Sighting(step, self._where.dataset, epoch, lane, source, row, skipped)

    def _epochs(self) -> Iterator[int]:
        """Epochs that are to come, for ever or until the data set is used up."""
        for epoch in itertools.count():
            if not self._where.has_epoch(epoch):
                return
            if epoch not in self._done:
                yield epoch

    def next(self) -> Iterator[Sighting]:
        """About when the sample is next, if the ledger has a pace to go by."""
        ledger, where, frame = self._trace.ledger, self._where, self._frame
        if not self._numbers or frame.end <= ledger.spans[self._numbers[-1]][1]:
            return
        latest = ledger.segment(self._numbers[-1])
        pace = draws_per_step(latest)
        estimates = []
        for epoch in itertools.islice(self._epochs(), where.drift):
            lane, cursor = where.find(epoch)
            fed = where.estimate(latest.state, lane, cursor, pace) if pace else None
            step = None if fed is None else latest.last + fed - latest.state.step
            if step is not None and step <= frame.end:
                estimates.append(self._sighting(step, epoch, lane, Source.ESTIMATE))
        yield from sorted(estimates, key=lambda sighting: sighting.step)[:1]

    def until(self, step: int, advance: Advance) -> Iterator[Sighting]:
        """Every step up to ``step`` that is not written down yet, found by playing the lanes that draw the sample."""
        last = min(step, self._frame.end)
        written = self._trace.ledger.spans[self._numbers[-1]][1] if self._numbers else self._frame.begin
        if last <= written:
            return
        played: dict[int, tuple[list[Sighting], int]] = {}
        reached = self._where.latest_epoch(self._trace.ledger.state(self._numbers[-1])) if self._numbers else 0
        for epoch in self._epochs():
            if epoch > reached + self._where.drift:
                return
            lane, _ = self._where.find(epoch)
            if lane not in played:
                played[lane] = self._play(lane, last, advance)
            sightings, at = played[lane]
            reached = max(reached, at)
            yield from (sighting for sighting in sightings if sighting.epoch == epoch)

    def _play(self, lane: int, last: int, advance: Advance) -> tuple[list[Sighting], int]:
        """Where one lane has the sample up to the step ``last``, and the epoch it is in then."""
        frame, where = self._frame, self._where
        start, replay = self._trace.replay(frame, last, [lane])
        names = [dataset.name for dataset in frame.data.datasets]
        found, epoch = [], 0
        for step in range(start + 1, last + 1):
            (pack,) = replay.next_step().values()
            advance(1)
            for skip in replay.take_skipped():
                if (skip.dataset, skip.index) == (where.dataset, where.sample):
                    found.append(self._sighting(step, skip.epoch, lane, Source.REPLAY, skipped=skip.reason))
            for place, drawn in enumerate(pack):
                if names[drawn.dataset] == where.dataset:
                    epoch = max(epoch, drawn.epoch)
                    if drawn.sample == where.sample:
                        row = _row(replay, names, step, lane, place, drawn)
                        found.append(self._sighting(step, drawn.epoch, lane, Source.REPLAY, row))
        return found, epoch


def _row(replay: Replay, names: Sequence[str], step: int, lane: int, place: int, drawn: Drawn) -> Row:
    tokens = replay.document(drawn).num_tokens
    return Row(step, lane, place, names[drawn.dataset], drawn.epoch, drawn.sample, drawn.part, tokens, None)
