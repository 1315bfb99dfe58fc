"""Lookup of the samples of a step and of the steps of a sample, from the run folder and the manifests.

    step   --sample log--> rows;  not logged (yet): replay from the last snapshot before the step
    sample --inverse of the order--> lane and cursor of each epoch --binary search of the snapshots--> segment --> rows
                                                                   --replay, or estimate--> future steps

A logged step is found by file name, and the logged steps of a sample by one binary search per epoch; without a
manifest, by reading all segments. A step k steps after the last snapshot requires a replay of k steps. Not for: the
content of samples (``data_pipeline.history.sample_lookup``).
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
from data_pipeline.errors import SampleLogError
from data_pipeline.history.replay import Replay
from data_pipeline.history.sample_log import LogRow, SampleLog
from data_pipeline.history.sample_lookup import SampleCatalog
from data_pipeline.history.sample_steps import SampleSteps, draws_per_step
from data_pipeline.loader.front_to_back import commands
from data_pipeline.media_spec import MediaSpec
from data_pipeline.order.fault_policy import Skipped
from data_pipeline.order.state import Drawn
from mmscale.bad_steps.roll_back import RollBack, effective_roll_backs, read_roll_backs
from mmscale.config import load
from mmscale.errors import ConfigError
from mmscale.run.config import RunConfig
from mmscale.run.folder import BAD_STEPS, CONFIG, SAMPLE_LOG

Advance = Callable[[int], object]
"""Called with the number of newly replayed steps, for a progress bar."""


class Evidence(str, Enum):
    """How a step of a sample is known."""

    SAMPLE_LOG = "sample_log"
    """Logged when the step was done."""
    REPLAY = "replay"
    """Computed by a replay. It is correct unless an image is damaged, which a replay cannot find."""
    ESTIMATE = "estimate"
    """Estimated from the number of samples before it and the pace of the latest segment."""


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step.

    Attributes:
        step: Number of the step, from 1.
        stage: Name of its stage.
        source: ``sample_log`` or ``replay``.
        rows: The documents, by lane and position in the pack.
        skipped: Records of the samples that were skipped while the step was made.
        replayed_from: The step after which the replay started (as ``SampleLookup.replay``); None if the step is logged.
    """

    step: int
    stage: str
    source: Evidence
    rows: tuple[LogRow, ...]
    skipped: tuple[Mapping[str, Any], ...] = ()
    replayed_from: int | None = None


@dataclass(frozen=True)
class Occurrence:
    """A step in which a sample occurs, was skipped, or will occur.

    Attributes:
        step: Number of the step, from 1.
        dataset: Name of the data set.
        epoch: Epoch of the data set.
        lane: The lane that draws the sample.
        source: How the step is known.
        row: The document; None for an estimate or a skipped sample.
        skipped: The reason if the sample was skipped.
    """

    step: int
    dataset: str
    epoch: int
    lane: int
    source: Evidence
    row: LogRow | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class LoaderSteps:
    """The steps of a run that one loader makes.

    Attributes:
        begin: Number of steps of the run before the first of these.
        end: The last of these steps, according to the configuration.
        data: The data block.
        spec: Inputs of the model in these steps.
    """

    begin: int
    end: int
    data: DataConfig
    spec: MediaSpec


def loaders_of(config: RunConfig) -> list[LoaderSteps]:
    """Return the steps of each loader of a run, in order. Stages may share a loader (``RunConfig.continues``)."""
    found: list[LoaderSteps] = []
    done = 0
    for number, stage in enumerate(config.stages):
        begin = found.pop().begin if config.continues(number) else done
        done += stage.steps
        found.append(LoaderSteps(begin, done, config.stage_data(number), config.stage_media(number)))
    return found


class SampleLookup:
    """Looks up samples and steps of a run.

    Args:
        run: The run folder.

    Raises:
        ConfigError: ``run`` is not a run folder.
    """

    def __init__(self, run: Path) -> None:
        if not (run / CONFIG).is_file():
            raise ConfigError(f"{run}: no run folder: it contains no {CONFIG}")
        self.config = load(run / CONFIG, [], RunConfig).value
        self.sample_log = SampleLog(run / SAMPLE_LOG)
        self.loaders = loaders_of(self.config)
        self._roll_backs = effective_roll_backs(read_roll_backs(run / BAD_STEPS))
        self._drop_rolled_back()

    def _drop_rolled_back(self) -> None:
        """Ignore segments of steps that were rolled back: a killed run may not have removed their files."""
        sample_log, last = self.sample_log, self._roll_back(self.sample_log.last_step)
        if last is None or last.to_step == sample_log.last_step:
            return
        if sample_log.state(len(sample_log.step_ranges) - 1).step <= last.position.step:
            sample_log.step_ranges = [steps for steps in sample_log.step_ranges if steps[1] <= last.to_step]

    def _roll_back(self, step: int) -> RollBack | None:
        """Return the last roll-back to ``step`` or earlier; None if there is none."""
        return next((entry for entry in reversed(self._roll_backs) if entry.to_step <= step), None)

    def loader_of(self, step: int) -> LoaderSteps:
        """Return the loader of a step.

        Raises:
            SampleLogError: the run has no such step.
        """
        found = [loader for loader in self.loaders if loader.begin < step <= loader.end]
        if not found:
            raise SampleLogError(f"no step {step}: the run has the steps 1 to {self.loaders[-1].end}")
        return found[0]

    def catalog(self, loader: LoaderSteps) -> SampleCatalog:
        """Return the catalog of a loader's data sets, which checks them against the last logged state of the loader."""
        numbers = self.segments(loader)
        state = self.sample_log.state(numbers[-1]) if numbers else None
        return SampleCatalog(loader.data, loader.spec, self.config.seed, state)

    def _check_order(self, loader: LoaderSteps) -> None:
        """Check that the configuration gives the order in which the loader's steps were done.

        Raises:
            SampleLogError: seed, lanes, order or data sets were changed.
        """
        numbers = self.segments(loader)
        order = loader.data.order.model_dump(mode="json")
        parts = {"seed": self.config.seed, "lanes": loader.data.lanes, "order": order}
        state = self.sample_log.state(numbers[-1]) if numbers else None
        changed = [] if state is None else state.changed(parts)
        names = [dataset.name for dataset in loader.data.datasets]
        changed += [f"no data set {name}" for name in (state.datasets if state else ()) if name not in names]
        if changed:
            raise SampleLogError(f"config.yaml was changed since these steps were done: {', '.join(changed)}")

    def stage_name(self, step: int) -> str:
        """Return the name of the stage of a step, according to the configuration."""
        for stage in self.config.stages:
            if step <= stage.steps:
                return stage.name
            step -= stage.steps
        return self.config.stages[-1].name

    def samples_of(
        self, step: int, lanes: Collection[int] | None = None, advance: Advance = lambda count: None
    ) -> StepSamples:
        """Return the samples of a step: from the sample log, or by a replay if the step is not logged.

        Args:
            step: Number of the step, from 1, as in ``metrics.jsonl``.
            lanes: Lanes to return; None for all.
            advance: Called after each replayed step.

        Raises:
            SampleLogError: the run has no such step or lane, the segment is damaged, or a replay would have to run the
                user's code.
            DataPipelineError: a replay needs a shard that is missing, or the data block was changed since the snapshot.
        """
        loader = self.loader_of(step)
        outside = [lane for lane in lanes or () if not 0 <= lane < loader.data.lanes]
        if outside:
            raise SampleLogError(f"no lane {outside[0]}: step {step} has the lanes 0 to {loader.data.lanes - 1}")
        number = self.sample_log.number_of(step)
        if number is None:
            return self._replayed(loader, step, lanes, advance)
        segment = self.sample_log.segment(number)
        skipped = (record for record in segment.skipped if record["step"] == step)
        return StepSamples(
            step,
            self.stage_name(step),
            Evidence.SAMPLE_LOG,
            tuple(segment.rows_of_step(step, lanes)),
            tuple(record for record in skipped if lanes is None or record["lane"] in lanes),
        )

    def _replayed(self, loader: LoaderSteps, step: int, lanes: Collection[int] | None, advance: Advance) -> StepSamples:
        start, replay = self.replay(loader, step - 1, lanes)
        packs: dict[int, tuple[Drawn, ...]] = {}
        skipped: tuple[Skipped, ...] = ()
        for _ in range(start, step):
            packs, skipped = replay.next_step(), replay.pop_skipped()
            advance(1)
        names = [dataset.name for dataset in loader.data.datasets]
        rows = [
            _row(replay, names, step, lane, place, drawn)
            for lane, pack in packs.items()
            for place, drawn in enumerate(pack)
        ]
        records = tuple({"step": step, **skip.record()} for skip in skipped)
        return StepSamples(step, self.stage_name(step), Evidence.REPLAY, tuple(rows), records, start)

    def replay(self, loader: LoaderSteps, step: int, lanes: Collection[int] | None) -> tuple[int, Replay]:
        """Return the step of a loader's last snapshot at ``step`` or earlier, and a replay that starts after it.

        Without a snapshot, the replay starts at the loader's first step. A roll-back counts as a snapshot: it records
        the position in the data. After a roll-back the step of the run and the step of the loader differ.

        Raises:
            SampleLogError: the replay would run the user's code, or config.yaml does not fit the snapshot.
            DataPipelineError: as ``Replay``.
        """
        with_code = [dataset.name for dataset in loader.data.datasets if dataset.code or commands(dataset.shards)]
        if with_code:
            raise SampleLogError(
                f"the step is not logged, and `data trace` does not run the code of data set {with_code[0]}"
            )
        snapshot = self.sample_log.snapshot(step)
        spec, seed = loader.spec, self.config.seed
        entry = self._roll_back(step)
        if entry is not None and entry.stage_begin < loader.begin:
            entry = None
        if entry is not None and (snapshot is None or snapshot.last <= entry.to_step):
            return entry.to_step, Replay(loader.data, spec, seed, entry.position, lanes)
        if snapshot is None or snapshot.last <= loader.begin:
            return loader.begin, Replay(loader.data, spec, seed, None, lanes)
        skipped_steps = 0 if entry is None else entry.position.step - (entry.to_step - loader.begin)
        if snapshot.state.step != snapshot.last - loader.begin + skipped_steps:
            raise SampleLogError(
                f"the stages in config.yaml were changed since step {snapshot.last}: according to them its data began "
                f"at step {loader.begin}, according to the sample log at {snapshot.last - snapshot.state.step}"
            )
        return snapshot.last, Replay(loader.data, spec, seed, snapshot.state, lanes)

    def steps_of(
        self, shard: str, key: str, until: int | None = None, advance: Advance = lambda count: None
    ) -> Iterator[Occurrence]:
        """Yield the steps of a sample: for each loader the logged ones, then future ones.

        Args:
            shard: Path or name of the tar.
            key: Key of the sample in the tar; the row of the sample, such as ``#17``, for a tar without an index.
            until: Find future steps up to this one by replays. None estimates the next one.
            advance: Called after each replayed step.

        Raises:
            SampleLogError: no data set of the run has this sample, or config.yaml was changed since.
            DataPipelineError: as ``samples_of``.
        """
        is_found = False
        for loader in self.loaders:
            self._check_order(loader)
            catalog = self.catalog(loader)
            for dataset, sample in catalog.find(shard, key):
                is_found = True
                steps = SampleSteps(loader.data, self.config.seed, dataset, sample, catalog.sizes)
                search = _SampleSearch(self, loader, steps)
                yield from search.logged()
                yield from search.estimated() if until is None else search.replayed(until, advance)
            for dataset, sample in catalog.find_streamed(shard, key):
                is_found = True
                if until is not None:
                    raise SampleLogError(
                        f"{dataset} is streamed without an index, so its future steps are unknown; omit --until"
                    )
                yield from self._scan(loader, dataset, sample)
        if not is_found:
            raise SampleLogError(f"no data set of this run has a shard {shard} with the key {key}")

    def segments(self, loader: LoaderSteps) -> range:
        """Return the numbers of the segments of the sample log that belong to a loader."""
        step_ranges = self.sample_log.step_ranges
        first = bisect.bisect_left(step_ranges, (loader.begin + 1, 0))
        return range(first, bisect.bisect_right(step_ranges, (loader.end, loader.end)))

    def _scan(self, loader: LoaderSteps, dataset: str, sample: int) -> Iterator[Occurrence]:
        """Yield the logged steps of a sample by reading all segments: without an index the order has no inverse."""
        for number in self.segments(loader):
            segment = self.sample_log.segment(number)
            for record in segment.skipped:
                if (record["dataset"], record["index"]) == (dataset, sample):
                    origin = (record["step"], dataset, record["epoch"], record["lane"])
                    yield Occurrence(*origin, Evidence.SAMPLE_LOG, skipped=record["reason"])
            for row in segment.rows_of_sample(dataset, sample):
                yield Occurrence(row.step, dataset, row.epoch, row.lane, Evidence.SAMPLE_LOG, row)


class _SampleSearch:
    """The search for the steps of one sample of one loader. Call ``logged`` first, and consume it."""

    def __init__(self, lookup: SampleLookup, loader: LoaderSteps, steps: SampleSteps) -> None:
        self._lookup, self._loader, self._steps = lookup, loader, steps
        self._numbers = lookup.segments(loader)
        self._done: set[int] = set()
        """Epochs without future occurrences."""

    def logged(self) -> Iterator[Occurrence]:
        """Yield the logged steps."""
        for found in self._steps.logged(self._lookup.sample_log, self._numbers):
            if not found.waits:
                self._done.add(found.epoch)
            for record in found.skipped:
                yield self._occurrence(
                    record["step"], found.epoch, found.lane, Evidence.SAMPLE_LOG, skipped=record["reason"]
                )
            for row in found.rows:
                yield self._occurrence(row.step, found.epoch, found.lane, Evidence.SAMPLE_LOG, row)

    def _occurrence(
        self, step: int, epoch: int, lane: int, source: Evidence, row: LogRow | None = None, skipped: str | None = None
    ) -> Occurrence:
        return Occurrence(step, self._steps.dataset, epoch, lane, source, row, skipped)

    def _epochs(self) -> Iterator[int]:
        """Yield the epochs with future occurrences; endless without ``max_epochs``."""
        for epoch in itertools.count():
            if not self._steps.has_epoch(epoch):
                return
            if epoch not in self._done:
                yield epoch

    def estimated(self) -> Iterator[Occurrence]:
        """Yield an estimate of the next step, or nothing if no step is logged or all steps of the loader are."""
        sample_log, steps, loader = self._lookup.sample_log, self._steps, self._loader
        if not self._numbers or loader.end <= sample_log.step_ranges[self._numbers[-1]][1]:
            return
        latest = sample_log.segment(self._numbers[-1])
        pace = draws_per_step(latest)
        estimates = []
        for epoch in itertools.islice(self._epochs(), steps.lookahead_epochs):
            lane, cursor = steps.find(epoch)
            loader_step = steps.estimate(latest.state, lane, cursor, pace) if pace else None
            step = None if loader_step is None else latest.last + loader_step - latest.state.step
            if step is not None and step <= loader.end:
                estimates.append(self._occurrence(step, epoch, lane, Evidence.ESTIMATE))
        yield from sorted(estimates, key=lambda occurrence: occurrence.step)[:1]

    def replayed(self, until: int, advance: Advance) -> Iterator[Occurrence]:
        """Yield the steps up to ``until`` that are not logged, by replays of the lanes that draw the sample."""
        last = min(until, self._loader.end)
        logged = self._lookup.sample_log.step_ranges[self._numbers[-1]][1] if self._numbers else self._loader.begin
        if last <= logged:
            return
        replayed: dict[int, tuple[list[Occurrence], int]] = {}
        latest = self._steps.latest_epoch(self._lookup.sample_log.state(self._numbers[-1])) if self._numbers else 0
        for epoch in self._epochs():
            if epoch > latest + self._steps.lookahead_epochs:
                return
            lane, _ = self._steps.find(epoch)
            if lane not in replayed:
                replayed[lane] = self._replay_lane(lane, last, advance)
            occurrences, lane_epoch = replayed[lane]
            latest = max(latest, lane_epoch)
            yield from (occurrence for occurrence in occurrences if occurrence.epoch == epoch)

    def _replay_lane(self, lane: int, last: int, advance: Advance) -> tuple[list[Occurrence], int]:
        """Replay one lane up to ``last``. Return the occurrences, and the lane's latest epoch of the data set."""
        loader, steps = self._loader, self._steps
        start, replay = self._lookup.replay(loader, last, [lane])
        names = [dataset.name for dataset in loader.data.datasets]
        found, epoch = [], 0
        for step in range(start + 1, last + 1):
            (pack,) = replay.next_step().values()
            advance(1)
            for skip in replay.pop_skipped():
                if (skip.dataset, skip.index) == (steps.dataset, steps.sample):
                    found.append(self._occurrence(step, skip.epoch, lane, Evidence.REPLAY, skipped=skip.reason))
            for place, drawn in enumerate(pack):
                if names[drawn.dataset] == steps.dataset:
                    epoch = max(epoch, drawn.epoch)
                    if drawn.sample == steps.sample:
                        row = _row(replay, names, step, lane, place, drawn)
                        found.append(self._occurrence(step, drawn.epoch, lane, Evidence.REPLAY, row))
        return found, epoch


def _row(replay: Replay, names: Sequence[str], step: int, lane: int, place: int, drawn: Drawn) -> LogRow:
    tokens = replay.document(drawn).num_tokens
    return LogRow(step, lane, place, names[drawn.dataset], drawn.epoch, drawn.sample, drawn.part, tokens, None)
