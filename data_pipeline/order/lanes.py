"""The order of a lane's samples: order and mixture as pure functions of integers.

    samples   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | ...      consecutive samples form blocks
    epoch     block 2, block 0, block 1, ...           a Feistel permutation of the block ids
    lane l    positions l, l + L, l + 2L, ... of the endless sequence of blocks
    window    ``window_blocks`` blocks of a lane, whose samples are permuted among themselves
    mixture   weights of the step --Schedule--> phase --Mixture--> data set of the next draw --its order--> sample

No order is stored: a cursor of a data set of 10^10 samples is resolved in less than a millisecond, so a resumed run
starts as fast as a new one. ``LaneOrder.find`` is the inverse, from a sample to its cursor. A lane is a row of the
global batch. Ranks and workers own lanes and do not change the order.

The draws of a phase follow Tijdeman's sequence. In this sequence the count of each data set is always within one draw
of its exact share. A lane starts inside the sequence, so its own counts are within two draws. With random draws the
error would grow as the square root of the count. A phase begins when weights change or a data set is exhausted; its
counts start at 0. Not for: cryptography, reading samples (``loader/sample_source``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.errors import DataConfigError
from data_pipeline.io.strict import StrictConfig
from data_pipeline.order.randomness import Permutation
from data_pipeline.order.state import Cursor, Drawn, SamplePosition, StreamPosition

# Samples of a window that are computed at once: a lane holds 4 KiB of them, whatever the size of its windows.
_CHUNK = 512
# Weights become fractions: 0.1 must be exactly 1/10, or the shares drift over 10^10 draws.
_MAX_DENOMINATOR = 10**9
# Lanes start at up to this many different positions of the sequence; more would only take longer to compute.
_MAX_HEAD_START = 1024


class OrderConfig(StrictConfig):
    """Shuffling in two stages: blocks of samples are permuted, then the samples of a window of blocks."""

    block_size: int = Field(default=16, ge=1, le=1 << 20)
    """Number of consecutive samples in a block. Larger blocks are read more sequentially; smaller blocks shuffle
    better."""
    window_blocks: int = Field(default=8, ge=1, le=1 << 20)
    """Number of consecutive blocks of a lane that form a window, inside which samples are permuted."""


@dataclass(frozen=True, slots=True)
class _Window:
    """The blocks of one window and the permutation of their samples."""

    epoch: int
    number: int
    ends: npt.NDArray[np.int64]
    """Prefix sums of the blocks' lengths: end of each block in the window."""
    shifts: npt.NDArray[np.int64]
    """For each block, the difference between the number of a sample and its position in the window."""
    order: Permutation

    def samples(self, first: int) -> memoryview:
        """Return the samples at the offsets from ``first`` on, at most ``_CHUNK``, as int64."""
        positions = self.order.values_at(np.arange(first, min(first + _CHUNK, self.order.size)))
        samples = positions + self.shifts[np.searchsorted(self.ends, positions, side="right")]
        return samples.data

    def blocks(self) -> list[range]:
        """Return the samples of each block, in the order of the blocks."""
        ends, shifts = self.ends.tolist(), self.shifts.tolist()
        return [range(a + shift, b + shift) for a, b, shift in zip([0, *ends], ends, shifts, strict=False)]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive offsets of a window: ``samples[i]`` is the sample at offset ``first + i``."""

    window: _Window
    first: int
    samples: memoryview


@dataclass(frozen=True)
class LaneOrder:
    """The endless order of one lane over one data set. It caches the chunk that was resolved last.

    Args:
        num_samples: Number of samples of the data set, at least 1.
        block_size: Number of consecutive samples of a block. Larger blocks are read faster, above all from object
            stores, and shuffle less.
        window_blocks: Number of blocks of a window, inside which samples are permuted.
        seed: Seed of the data set (``sample_source.dataset_seed``).
        lane: Number of this lane.
        num_lanes: Number of lanes. Each sample occurs in exactly one lane per epoch.

    Raises:
        DataConfigError: there is no sample, or ``lane`` is outside ``range(num_lanes)``.
    """

    num_samples: int
    block_size: int
    window_blocks: int
    seed: int
    lane: int
    num_lanes: int
    _chunk: _Chunk | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataConfigError("a data set without samples cannot be ordered: is the manifest empty?")
        if not 0 <= self.lane < self.num_lanes:
            raise DataConfigError(f"lane {self.lane} of {self.num_lanes} lanes: expected 0 <= lane < {self.num_lanes}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the data set; their lengths differ by at most one."""
        return -(-self.num_samples // self.block_size)

    def resolve(self, cursor: Cursor) -> tuple[SamplePosition, Cursor]:
        """Return the sample at ``cursor`` and the cursor after it.

        Takes less than a microsecond inside the cached chunk, otherwise less than a millisecond (for windows of up to a
        few hundred blocks). Memory does not depend on the size of the data set.
        """
        epoch, window, offset = cursor
        chunk = self._chunk
        if chunk is not None and chunk.window.number == window and chunk.window.epoch == epoch:
            index = offset - chunk.first
            if 0 <= index < len(chunk.samples):
                return SamplePosition(chunk.samples[index], epoch), Cursor(epoch, window, offset + 1)
        return self._seek(epoch, window, offset)

    def _seek(self, epoch: int, window: int, offset: int) -> tuple[SamplePosition, Cursor]:
        """As ``resolve``, for a cursor outside of the cached chunk."""
        while (blocks := self._window(self.lane, epoch, window)) is None or offset >= blocks.order.size:
            if blocks is not None:
                window, offset = window + 1, 0
            else:  # The lane has no further block in this epoch. With few blocks it may have none for several epochs.
                position = self._first_position(self.lane, epoch + 1)
                epoch, window, offset = position // self.num_blocks, 0, 0
        first = offset - offset % _CHUNK
        chunk = _Chunk(blocks, first, blocks.samples(first))
        object.__setattr__(self, "_chunk", chunk)
        return SamplePosition(chunk.samples[offset - first], epoch), Cursor(epoch, window, offset + 1)

    def blocks(self, cursor: Cursor) -> list[range]:
        """Return the samples of each block of a cursor's window, then of the lane's next window; for prefetching.

        Empty if the cursor is after the lane's last window of its epoch.
        """
        window = self._window(self.lane, cursor.epoch, cursor.window)
        if window is None:
            return []
        following, epoch = self._window(self.lane, cursor.epoch, cursor.window + 1), cursor.epoch
        if following is None:
            epoch = self._first_position(self.lane, epoch + 1) // self.num_blocks
            following = self._window(self.lane, epoch, 0)
        assert following is not None, "the first position of a lane in an epoch belongs to its first window"
        return [*window.blocks(), *following.blocks()]

    def find(self, sample: int, epoch: int) -> tuple[int, Cursor]:
        """Return the lane and the cursor at which ``sample`` occurs in ``epoch``: the inverse of ``resolve``.

        The result does not depend on ``self.lane``.

        Raises:
            IndexError: ``sample`` is outside ``range(num_samples)``, or ``epoch`` is negative.
        """
        if not 0 <= sample < self.num_samples or epoch < 0:
            raise IndexError(f"sample {sample} of {self.num_samples}, epoch {epoch}")
        # The last block that starts at the sample or before: block * num_samples < (sample + 1) * num_blocks.
        block = ((sample + 1) * self.num_blocks - 1) // self.num_samples
        position = epoch * self.num_blocks + Permutation(self.num_blocks, self.seed, epoch).index(block)
        lane = position % self.num_lanes
        earlier = (position - self._first_position(lane, epoch)) // self.num_lanes
        number, inside = divmod(earlier, self.window_blocks)
        window = self._window(lane, epoch, number)
        assert window is not None, "the window holds the block that was looked up"
        return lane, Cursor(epoch, number, window.order.index(sample - int(window.shifts[inside])))

    def _first_position(self, lane: int, epoch: int) -> int:
        """Return a lane's first position in the endless sequence of blocks, from the start of the epoch on."""
        start = epoch * self.num_blocks
        return start + (lane - start) % self.num_lanes

    def _window(self, lane: int, epoch: int, number: int) -> _Window | None:
        """Return a window of a lane; None after the lane's last window of the epoch."""
        cached = self._chunk.window if self._chunk is not None and lane == self.lane else None
        if cached is not None and (cached.epoch, cached.number) == (epoch, number):
            return cached
        start = epoch * self.num_blocks
        step = self.window_blocks * self.num_lanes
        first = self._first_position(lane, epoch) + number * step - start
        positions = range(first, min(self.num_blocks, first + step), self.num_lanes)
        if not positions:
            return None
        order = Permutation(self.num_blocks, self.seed, epoch)
        ids = order.values_at(np.array(positions)).tolist()
        # Python's integers, because the products can exceed 2^63.
        starts = np.array([block * self.num_samples // self.num_blocks for block in ids])
        ends = np.array([(block + 1) * self.num_samples // self.num_blocks for block in ids])
        lengths = ends - starts
        window_ends = np.cumsum(lengths)
        # The stream is the window's first position plus one: stream 0 is the permutation of the blocks.
        samples = Permutation(int(window_ends[-1]), self.seed, epoch, stream=start + first + 1)
        return _Window(epoch, number, window_ends, starts - (window_ends - lengths), samples)


class Mixture:
    """The choice of data sets of one lane in one phase.

    In the sequence the count of a data set differs from its exact share by less than one. Lanes start at different
    positions of the sequence, so that a step over all lanes is mixed too. Counted from the start of a lane, the error
    is less than two. If the period of the sequence is at most 1024, that many lanes together have no error.

    Args:
        weights: Relative weight of each data set, at least 0; a data set with weight 0 is never drawn.
        lane: The lane starts at this position of the sequence, modulo the smaller of the period and 1024.

    Raises:
        DataConfigError: no weight is above 0, or a weight is negative, infinite, or below 1e-9.

    Source: Tijdeman 1980, "The chairman assignment problem", theorem 1: the error is at most 1 - 1 / (2k - 2).
    """

    def __init__(self, weights: Sequence[float], lane: int = 0) -> None:
        if any(not 0 <= weight < float("inf") for weight in weights):
            raise DataConfigError(f"data set weights must be finite and not below 0, got {list(weights)}")
        exact = [Fraction(weight).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
        if any(weight and not share for weight, share in zip(weights, exact, strict=True)):
            raise DataConfigError(f"data set weights must be 0 or at least 1e-9, got {list(weights)}")
        if not any(exact):
            raise DataConfigError(f"no data set has a weight above 0: {list(weights)}")
        scale = lcm(*(share.denominator for share in exact))
        self._shares = [int(share * scale) for share in exact]
        self._total = sum(self._shares)
        self._drawn = [i for i, share in enumerate(self._shares) if share]
        self._history = [0] * len(weights)
        for _ in range(lane % min(self._total, _MAX_HEAD_START)):  # The sequence repeats after ``total`` draws.
            self._history[self.choose([0] * len(weights))] += 1

    def choose(self, draws: Sequence[int]) -> int:
        """Return the index of the data set to draw from next.

        Args:
            draws: Number of draws of each data set in this phase so far.
        """
        if len(self._drawn) == 1:
            return self._drawn[0]
        counts = [before + drawn for before, drawn in zip(self._history, draws, strict=True)]
        coming = sum(counts) + 1
        # ``behind``: by how much a count is too small if its data set is not drawn next, in units of 1/(total * slack).
        slack = 2 * len(self._drawn) - 2
        best, best_wait = -1, Fraction(0)
        for i in self._drawn:
            behind = (self._shares[i] * coming - self._total * counts[i]) * slack
            if behind < self._total:
                continue
            # Draws until the count would be too small; the data set with the fewest is next, the first of equals.
            wait = Fraction(self._total * (slack - 1) - behind, self._shares[i])
            if best < 0 or wait < best_wait:
                best, best_wait = i, wait
        return best


@dataclass(frozen=True)
class Schedule:
    """The weights of the data sets over steps. In a phase the weights are constant.

    Attributes:
        starts: First step of each phase, ascending; the first is 0.
        weights: Weights of all data sets in each phase.
    """

    starts: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def from_changes(cls, changes: Sequence[Sequence[tuple[int, float]]]) -> Schedule:
        """Return the schedule of weight changes.

        Args:
            changes: For each data set its (first step, weight) pairs, ascending. Before the first step the weight is 0.
        """
        starts = sorted({0, *(start for dataset in changes for start, _ in dataset)})
        rows = [tuple(_weight_at(dataset, start) for dataset in changes) for start in starts]
        kept = [i for i in range(len(starts)) if i == 0 or rows[i] != rows[i - 1]]
        return cls(tuple(starts[i] for i in kept), tuple(rows[i] for i in kept))

    def phase(self, step: int) -> int:
        """Return the number of the phase of ``step``."""
        return bisect_right(self.starts, step) - 1


def _weight_at(changes: Sequence[tuple[int, float]], step: int) -> float:
    weight = 0.0
    for start, value in changes:
        if start <= step:
            weight = value
    return weight


class SampleOrder(Protocol):
    """The order of one lane's samples of a data set."""

    def resolve(self, cursor: Cursor) -> tuple[SamplePosition, Cursor]:
        """Return the sample at ``cursor`` and the cursor after it."""


class LaneSequence:
    """The order of one lane's samples over all data sets.

    Args:
        sources: Order of the lane in each data set.
        max_epochs: Number of epochs of each data set; None: no limit.
        schedule: Weights of the data sets over steps.
        lane: Number of this lane.
    """

    def __init__(
        self, sources: Sequence[SampleOrder], max_epochs: Sequence[int | None], schedule: Schedule, lane: int
    ) -> None:
        self._sources, self._max_epochs = sources, max_epochs
        self._schedule, self._lane = schedule, lane
        self._mixtures: dict[tuple[int, int], Mixture | None] = {}

    def draw(self, position: StreamPosition, step: int) -> tuple[Drawn | None, StreamPosition]:
        """Return the sample to draw for ``step``, and the position after it.

        The sample is None if every data set with a weight above 0 at ``step`` is exhausted.
        """
        phase = self._schedule.phase(step)
        if phase != position.phase:
            position = _begin_phase(position, phase, position.exhausted)
        while (mixture := self._mixture(position.phase, position.exhausted)) is not None:
            chosen = mixture.choose(position.draws)
            at, after = self._sources[chosen].resolve(position.cursors[chosen])
            max_epochs = self._max_epochs[chosen]
            if max_epochs is not None and at.epoch >= max_epochs:
                position = _begin_phase(position, position.phase, position.exhausted | 1 << chosen)
                continue
            draws, cursors = position.draws, position.cursors
            next_position = StreamPosition(
                (*draws[:chosen], draws[chosen] + 1, *draws[chosen + 1 :]),
                (*cursors[:chosen], after, *cursors[chosen + 1 :]),
                position.phase,
                position.exhausted,
            )
            return Drawn(chosen, at.epoch, at.sample), next_position
        return None, position

    def is_current(self, position: StreamPosition, step: int) -> bool:
        """Return whether ``position`` belongs to the phase of ``step``, so that both have the same mixture weights."""
        return position.phase == self._schedule.phase(step)

    def _mixture(self, phase: int, exhausted: int) -> Mixture | None:
        """Return the mixture of the data sets that are not exhausted; None if there is none with a weight above 0."""
        key = (phase, exhausted)
        if key not in self._mixtures:
            weights = [0.0 if exhausted >> i & 1 else w for i, w in enumerate(self._schedule.weights[phase])]
            self._mixtures[key] = Mixture(weights, self._lane) if any(weights) else None
        return self._mixtures[key]


def _begin_phase(position: StreamPosition, phase: int, exhausted: int) -> StreamPosition:
    """Return the position at the start of another mixture, with draw counts of 0."""
    return StreamPosition((0,) * len(position.draws), position.cursors, phase, exhausted)
