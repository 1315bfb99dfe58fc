"""The steps in which one sample occurs, from the inverse of the order and the snapshots of a sample log.

    sample, epoch --LaneOrder.find--> lane, cursor --binary search for the snapshot after it--> segment of the log

A lookup reads a few snapshots for each epoch, whatever the number of steps. Future steps are only estimated
(``SampleSteps.estimate``). Not for: exact future steps (``replay``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_pipeline.config import DataConfig
from data_pipeline.history.sample_log import LogRow, LogSegment, SampleLog
from data_pipeline.loader.fingerprint import schedule_of
from data_pipeline.loader.sample_source import dataset_seed
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor, LaneState, LoaderState


class LoggedEpoch(NamedTuple):
    """The logged steps of a sample in one epoch.

    Attributes:
        epoch: The epoch.
        lane: The lane that draws the sample in this epoch.
        rows: The documents of the sample, by step.
        skipped: Records of the sample's faults (``Skipped.record()``), with their ``step``.
        waits: Whether the sample, or a part of it, is drawn but not packed yet.
    """

    epoch: int
    lane: int
    rows: tuple[LogRow, ...]
    skipped: tuple[dict[str, Any], ...]
    waits: bool


class SampleSteps:
    """Finds the steps of one sample of a data set with a manifest.

    Args:
        config: The data block.
        seed: Seed of the run.
        dataset: Name of the data set.
        sample: Number of the sample in the data set.
        sizes: Number of samples of each data set with a manifest.

    Attributes:
        max_epochs: Number of epochs of the data set; None: no limit.
        lookahead_epochs: Number of coming epochs in which to look for the next occurrence. If there are fewer blocks
            than lanes, a lane skips the epochs in which it has no block. Lanes can then be several epochs apart.
    """

    def __init__(self, config: DataConfig, seed: int, dataset: str, sample: int, sizes: Mapping[str, int]) -> None:
        self.dataset, self.sample = dataset, sample
        self._names = [entry.name for entry in config.datasets]
        self._number = self._names.index(dataset)
        self.max_epochs = config.datasets[self._number].max_epochs
        self._schedule = schedule_of(config, sizes)
        order, self._lanes = config.order, config.lanes
        seed = dataset_seed(seed, dataset)
        self._order = LaneOrder(sizes[dataset], order.block_size, order.window_blocks, seed, 0, config.lanes)
        self.lookahead_epochs = -(-config.lanes // self._order.num_blocks) + 1

    def find(self, epoch: int) -> tuple[int, Cursor]:
        """Return the lane and the cursor that draw the sample in an epoch."""
        return self._order.find(self.sample, epoch)

    def has_epoch(self, epoch: int) -> bool:
        """Return whether the data set has this epoch (``max_epochs``)."""
        return self.max_epochs is None or epoch < self.max_epochs

    def cursor(self, state: LoaderState, lane: int) -> Cursor:
        """Return the cursor of a lane in the data set."""
        return self._lane(state, lane).position.cursors[self._number]

    def latest_epoch(self, state: LoaderState) -> int:
        """Return the latest epoch of the data set in any lane."""
        return max(self.cursor(state, lane).epoch for lane in state.lanes)

    def waits(self, state: LoaderState, lane: int, epoch: int) -> bool:
        """Return whether the sample, or a part of it, is drawn in this epoch but not packed yet."""
        sample = (self._number, epoch, self.sample)
        return any(drawn[:3] == sample for drawn in self._lane(state, lane).waiting)

    def _lane(self, state: LoaderState, lane: int) -> LaneState:
        return state.lanes[lane].for_datasets(state.datasets, self._names)

    def logged(self, sample_log: SampleLog, numbers: range) -> Iterator[LoggedEpoch]:
        """Yield each epoch in which the sample was drawn, according to the segments ``numbers`` of a sample log.

        Raises:
            SampleLogError: a segment is damaged.
        """
        if not numbers:
            return
        end = sample_log.state(numbers[-1])
        for epoch in range(self.latest_epoch(end) + 1):
            lane, cursor = self.find(epoch)
            if self.cursor(end, lane) > cursor:
                yield self._in_epoch(sample_log, numbers, epoch, lane, cursor)

    def _in_epoch(self, sample_log: SampleLog, numbers: range, epoch: int, lane: int, cursor: Cursor) -> LoggedEpoch:
        # The first segment at whose end the sample was drawn; parts of the sample may be packed in later segments.
        first = bisect.bisect_left(numbers, True, key=lambda n: self.cursor(sample_log.state(n), lane) > cursor)
        rows, skipped, waits = list[LogRow](), list[dict[str, Any]](), True
        for number in numbers[first:]:
            segment = sample_log.segment(number)
            rows += segment.rows_of_sample(self.dataset, self.sample, epoch)
            skipped += self._skipped(segment, epoch)
            waits = self.waits(segment.state, lane, epoch)
            if not waits:
                break
        return LoggedEpoch(epoch, lane, tuple(rows), tuple(skipped), waits)

    def _skipped(self, segment: LogSegment, epoch: int) -> Iterator[dict[str, Any]]:
        for record in segment.skipped:
            if (record["dataset"], record["epoch"], record["index"]) == (self.dataset, epoch, self.sample):
                yield dict(record)

    def estimate(self, state: LoaderState, lane: int, cursor: Cursor, draws_per_step: float) -> int | None:
        """Estimate the number of loader steps after which a lane has drawn the sample; None if it never will.

        Args:
            state: The latest state of the loader.
            lane: The lane that draws the sample.
            cursor: The cursor of the sample in this lane.
            draws_per_step: Number of samples that a lane draws per step, over all data sets.
        """
        remaining = max(0.0, self._position(cursor) - self._position(self.cursor(state, lane)))
        step = float(state.step)
        phase = self._schedule.phase(state.step)
        while True:
            weights = self._schedule.weights[phase]
            pace = draws_per_step * weights[self._number] / sum(weights)
            is_last = phase + 1 == len(self._schedule.starts)
            room = float("inf") if is_last else (self._schedule.starts[phase + 1] - step) * pace
            if pace and remaining <= room:
                return int(step + remaining / pace) + 1
            if is_last:
                return None
            remaining -= room
            step, phase = float(self._schedule.starts[phase + 1]), phase + 1

    def _position(self, cursor: Cursor) -> float:
        """Estimate the number of samples that a lane draws from the data set before a cursor."""
        order = self._order
        block = order.num_samples / order.num_blocks
        return (
            cursor.epoch * order.num_samples / self._lanes + cursor.window * order.window_blocks * block + cursor.offset
        )


def draws_per_step(segment: LogSegment) -> float:
    """Return the average number of samples that a lane drew per step of a segment; a split sample counts once."""
    drawn = int((segment.rows["part"] == 0).sum()) + len(segment.skipped)
    return drawn / (segment.last - segment.first + 1) / max(1, len(segment.state.lanes))
