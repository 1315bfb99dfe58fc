"""The steps of one sample: where the order puts it, epoch for epoch, and which snapshots lie before and behind that.

    sample, epoch --LaneOrder.find--> lane, cursor --search: whose snapshot has passed it?--> segment of a ledger

A look-up costs a few snapshots, however many steps there are. Not for: steps to come, which nobody packed yet
(``replay``); ``estimate`` says about when they will be.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_pipeline.config import DataConfig
from data_pipeline.history.sample_log import Ledger, Row, Segment
from data_pipeline.loader.fingerprint import schedule_of
from data_pipeline.loader.sample_source import dataset_seed
from data_pipeline.order.lanes import LaneOrder
from data_pipeline.order.state import Cursor, LaneState, LoaderState


class Past(NamedTuple):
    """What a ledger says of a sample in one epoch.

    Attributes:
        rows: Its documents, step for step.
        skipped: Lists of faults that name it, with their ``step``.
        waits: Whether it, or a part of it, is drawn and not packed yet.
    """

    epoch: int
    lane: int
    rows: tuple[Row, ...]
    skipped: tuple[dict[str, Any], ...]
    waits: bool


class Whereabouts:
    """One sample of a data set.

    Args:
        config: The data block.
        seed: Seed of the run.
        dataset: Name of the data set.
        sample: Number of the sample in its manifest.
        sizes: Samples of each data set.
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
        # A lane of few blocks may own none for some epochs, and then runs ahead of the others by so many.
        self.drift = -(-config.lanes // self._order.num_blocks) + 1

    def find(self, epoch: int) -> tuple[int, Cursor]:
        """Lane and cursor that draw the sample in an epoch."""
        return self._order.find(self.sample, epoch)

    def has_epoch(self, epoch: int) -> bool:
        """Whether there is such an epoch at all."""
        return self.max_epochs is None or epoch < self.max_epochs

    def cursor(self, state: LoaderState, lane: int) -> Cursor:
        """Where a lane draws next from the data set."""
        return self._lane(state, lane).position.cursors[self._number]

    def latest_epoch(self, state: LoaderState) -> int:
        """The latest epoch of the data set that any lane is in."""
        return max(self.cursor(state, lane).epoch for lane in state.lanes)

    def waits(self, state: LoaderState, lane: int, epoch: int) -> bool:
        """Whether a part of the sample is drawn and not packed yet."""
        place = (self._number, epoch, self.sample)
        return any(drawn[:3] == place for drawn in self._lane(state, lane).waiting)

    def _lane(self, state: LoaderState, lane: int) -> LaneState:
        return state.lanes[lane].among(state.datasets, self._names)

    def past(self, ledger: Ledger, numbers: range) -> Iterator[Past]:
        """What the segments ``numbers`` of a ledger say, for each epoch in which the sample was drawn.

        Raises:
            LedgerError: a segment is damaged.
        """
        if not numbers:
            return
        end = ledger.state(numbers[-1])
        for epoch in range(self.latest_epoch(end) + 1):
            lane, cursor = self.find(epoch)
            if self.cursor(end, lane) > cursor:
                yield self._in_epoch(ledger, numbers, epoch, lane, cursor)

    def _in_epoch(self, ledger: Ledger, numbers: range, epoch: int, lane: int, cursor: Cursor) -> Past:
        passed = bisect.bisect_left(numbers, True, key=lambda n: self.cursor(ledger.state(n), lane) > cursor)
        rows, skipped, waits = list[Row](), list[dict[str, Any]](), True
        for number in numbers[passed:]:
            segment = ledger.segment(number)
            rows += segment.of_sample(self.dataset, self.sample, epoch)
            skipped += self._skipped(segment, epoch)
            waits = self.waits(segment.state, lane, epoch)
            if not waits:
                break
        return Past(epoch, lane, tuple(rows), tuple(skipped), waits)

    def _skipped(self, segment: Segment, epoch: int) -> Iterator[dict[str, Any]]:
        for record in segment.skipped:
            if (record["dataset"], record["epoch"], record["index"]) == (self.dataset, epoch, self.sample):
                yield dict(record)

    def estimate(self, state: LoaderState, lane: int, cursor: Cursor, draws_per_step: float) -> int | None:
        """About how many steps the loader will have done when a lane draws the sample; None if it never does.

        Args:
            state: The loader's latest.
            lane: The lane that draws it.
            cursor: Where.
            draws_per_step: Samples that a lane draws in a step, over all data sets.
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
        """About how many samples a lane draws before a cursor."""
        order = self._order
        block = order.num_samples / order.num_blocks
        return (
            cursor.epoch * order.num_samples / self._lanes + cursor.window * order.window_blocks * block + cursor.offset
        )


def draws_per_step(segment: Segment) -> float:
    """Samples that a lane drew in a step of a segment, on average; parts of one count once."""
    drawn = int((segment.rows["part"] == 0).sum()) + len(segment.skipped)
    return drawn / (segment.last - segment.first + 1) / max(1, len(segment.state.lanes))
