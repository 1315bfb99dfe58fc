"""Which sample a lane draws next: order and mixture as pure functions of integers.

    samples   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | ...      consecutive samples form blocks
    epoch     block 2, block 0, block 1, ...           a Feistel permutation of the block ids
    lane l    places l, l + L, l + 2L, ... of the endless sequence of blocks
    window    ``window_blocks`` of a lane's blocks, whose samples are permuted among themselves
    mixture   weights of the step --Schedule--> phase --Mixture--> data set of the next draw --its order--> sample

Nothing is stored and nothing is iterated: any cursor of a set of 10^10 samples is looked up in microseconds, so a
resumed run costs the same as a fresh one, and ``find`` goes back from a sample to its cursor. A lane is a row of the
global batch; ranks and workers own lanes and never change the order.

Draws of a phase follow Tijdeman's sequence: after any number of them every count is within one draw of its exact share,
not within the square root as with dice. A phase begins where weights change or a data set is used up, and counts anew.
Not for: cryptography, reading what is drawn (``loader/sample_source``).
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

from data_pipeline.errors import DataConfigError
from data_pipeline.order.randomness import Permutation
from data_pipeline.order.state import Cursor, Drawn, Place, StreamPosition

# Samples of a window that are worked out at once, so that a lane holds 4 KiB of them however large its windows are.
_CHUNK = 512
# 0.1 must mean 1/10 exactly, or proportions drift over 10^10 draws.
_MAX_DENOMINATOR = 10**9
# Lanes start at as many different places of the sequence; more would only take longer to find.
_MAX_HEAD_START = 1024


@dataclass(frozen=True, slots=True)
class _Window:
    """The blocks of one window and the permutation of their samples."""

    epoch: int
    number: int
    ends: npt.NDArray[np.int64]
    """Samples of the window up to the end of each block."""
    shifts: npt.NDArray[np.int64]
    """What to add to a position inside the window, block by block, for the sample that is stored there."""
    order: Permutation

    def samples(self, first: int) -> memoryview:
        """What is visited at the offsets from ``first`` on: a chunk of int64 samples."""
        positions = self.order.take(np.arange(first, min(first + _CHUNK, self.order.size)))
        samples = positions + self.shifts[np.searchsorted(self.ends, positions, side="right")]
        return samples.data

    def blocks(self) -> list[range]:
        """The samples of each block, in order of the blocks."""
        ends, shifts = self.ends.tolist(), self.shifts.tolist()
        return [range(a + shift, b + shift) for a, b, shift in zip([0, *ends], ends, shifts, strict=False)]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A stretch of a window: ``samples[i]`` is visited at the offset ``first + i``."""

    window: _Window
    first: int
    samples: memoryview


@dataclass(frozen=True)
class LaneOrder:
    """The endless order of one lane over one data set. Holds a chunk of the window that was asked for last.

    Args:
        num_samples: Samples of the data set, at least 1.
        block_size: Samples of a block; blocks are read front to back of the disk, so larger is faster on object
            stores and shuffles less.
        window_blocks: Blocks whose samples are mixed.
        seed: Seed of the run, mixed with the data set's name by the caller.
        lane: This lane.
        num_lanes: All lanes. Over them each sample occurs exactly once an epoch.
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
            raise DataConfigError(f"lane {self.lane} of {self.num_lanes} lanes")

    @property
    def num_blocks(self) -> int:
        """Blocks of the data set; their lengths differ by one at most."""
        return -(-self.num_samples // self.block_size)

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it.

        Under a microsecond for the next of a chunk, else under a millisecond (with windows of up to some hundred
        blocks), in memory independent of the size of the set.
        """
        epoch, window, offset = cursor
        chunk = self._chunk
        if chunk is not None and chunk.window.number == window and chunk.window.epoch == epoch:
            index = offset - chunk.first
            if 0 <= index < len(chunk.samples):
                return Place(chunk.samples[index], epoch), Cursor(epoch, window, offset + 1)
        return self._seek(epoch, window, offset)

    def _seek(self, epoch: int, window: int, offset: int) -> tuple[Place, Cursor]:
        """``resolve`` outside of the chunk at hand."""
        while (blocks := self._window(self.lane, epoch, window)) is None or offset >= blocks.order.size:
            if blocks is not None:
                window, offset = window + 1, 0
            else:  # The lane has no further block. With few blocks it may own none for several epochs.
                place = self._first_place(self.lane, epoch + 1)
                epoch, window, offset = place // self.num_blocks, 0, 0
        first = offset - offset % _CHUNK
        chunk = _Chunk(blocks, first, blocks.samples(first))
        object.__setattr__(self, "_chunk", chunk)
        return Place(chunk.samples[offset - first], epoch), Cursor(epoch, window, offset + 1)

    def blocks(self, cursor: Cursor) -> list[range]:
        """Samples of the blocks of a cursor's window, then of the window behind it: what a lane needs now and next."""
        window = self._window(self.lane, cursor.epoch, cursor.window)
        if window is None:
            return []
        following, epoch = self._window(self.lane, cursor.epoch, cursor.window + 1), cursor.epoch
        if following is None:
            epoch = self._first_place(self.lane, epoch + 1) // self.num_blocks
            following = self._window(self.lane, epoch, 0)
        assert following is not None, "the first place of a lane in an epoch belongs to its first window"
        return [*window.blocks(), *following.blocks()]

    def find(self, sample: int, epoch: int) -> tuple[int, Cursor]:
        """Lane and cursor that visit ``sample`` in ``epoch``, whichever lane this is: the inverse of ``resolve``.

        Raises:
            IndexError: ``sample`` is outside ``range(num_samples)``.
        """
        if not 0 <= sample < self.num_samples or epoch < 0:
            raise IndexError(f"sample {sample} of {self.num_samples}, epoch {epoch}")
        # The last block that starts at the sample or before: block * num_samples < (sample + 1) * num_blocks.
        block = ((sample + 1) * self.num_blocks - 1) // self.num_samples
        place = epoch * self.num_blocks + Permutation(self.num_blocks, self.seed, epoch).index(block)
        lane = place % self.num_lanes
        earlier = (place - self._first_place(lane, epoch)) // self.num_lanes
        number, inside = divmod(earlier, self.window_blocks)
        window = self._window(lane, epoch, number)
        assert window is not None, "the window holds the block that was looked up"
        return lane, Cursor(epoch, number, window.order.index(sample - int(window.shifts[inside])))

    def _first_place(self, lane: int, epoch: int) -> int:
        """First place of the endless sequence of blocks, from the epoch's start on, that belongs to a lane."""
        start = epoch * self.num_blocks
        return start + (lane - start) % self.num_lanes

    def _window(self, lane: int, epoch: int, number: int) -> _Window | None:
        """A window, or None past the lane's last one of this epoch."""
        at_hand = self._chunk.window if self._chunk is not None and lane == self.lane else None
        if at_hand is not None and (at_hand.epoch, at_hand.number) == (epoch, number):
            return at_hand
        start = epoch * self.num_blocks
        step = self.window_blocks * self.num_lanes
        first = self._first_place(lane, epoch) + number * step - start
        positions = range(first, min(self.num_blocks, first + step), self.num_lanes)
        if not positions:
            return None
        order = Permutation(self.num_blocks, self.seed, epoch)
        ids = order.take(np.array(positions)).tolist()
        # Python's integers: the products pass 2^63.
        starts = np.array([block * self.num_samples // self.num_blocks for block in ids])
        ends = np.array([(block + 1) * self.num_samples // self.num_blocks for block in ids])
        lengths = ends - starts
        behind = np.cumsum(lengths)
        # The stream is the window's first place, plus one: stream 0 is the permutation of the blocks.
        samples = Permutation(int(behind[-1]), self.seed, epoch, stream=start + first + 1)
        return _Window(epoch, number, behind, starts - (behind - lengths), samples)


class Mixture:
    """The choices of one lane in one phase.

    The sequence itself never strays by a whole draw. Lanes start at different places of it, so that one step over all
    lanes is mixed too: counted from a lane's start, a count is off by less than two, and over as many lanes as the
    sequence has places it is not off at all.

    Args:
        weights: Relative weight of each data set, from 0 up; one of weight 0 is never drawn.
        lane: Places by which this lane is ahead in the sequence.

    Raises:
        DataConfigError: no weight above 0, or one that cannot be kept exactly.

    Source: Tijdeman 1980, "The chairman assignment problem", theorem 1: the error is at most 1 - 1 / (2k - 2).
    """

    def __init__(self, weights: Sequence[float], lane: int = 0) -> None:
        if any(not 0 <= weight < float("inf") for weight in weights):
            raise DataConfigError(f"data set weights must be finite and not below 0, got {list(weights)}")
        exact = [Fraction(weight).limit_denominator(_MAX_DENOMINATOR) for weight in weights]
        if any(weight and not share for weight, share in zip(weights, exact, strict=True)):
            raise DataConfigError(f"data set weights below 1e-9 cannot be kept, got {list(weights)}")
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
        """Index of the data set to draw from, after ``draws[i]`` draws of each in this phase."""
        if len(self._drawn) == 1:
            return self._drawn[0]
        counts = [before + drawn for before, drawn in zip(self._history, draws, strict=True)]
        coming = sum(counts) + 1
        # In units of 1 / (total * slack): how far each is behind after the coming draw if it is not chosen.
        slack = 2 * len(self._drawn) - 2
        best, best_wait = -1, Fraction(0)
        for i in self._drawn:
            behind = (self._shares[i] * coming - self._total * counts[i]) * slack
            if behind < self._total:
                continue
            # Draws until it would be too far behind; the most urgent is next, of equals the first.
            wait = Fraction(self._total * (slack - 1) - behind, self._shares[i])
            if best < 0 or wait < best_wait:
                best, best_wait = i, wait
        return best


@dataclass(frozen=True)
class Schedule:
    """Weights over steps.

    Attributes:
        starts: First step of each phase, ascending; the first is 0.
        weights: Weights of all data sets in each phase.
    """

    starts: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, changes: Sequence[Sequence[tuple[int, float]]]) -> Schedule:
        """From (first step, weight) of each data set, ascending; before its first step a data set has weight 0."""
        starts = sorted({0, *(start for dataset in changes for start, _ in dataset)})
        rows = [tuple(_weight_at(dataset, start) for dataset in changes) for start in starts]
        kept = [i for i in range(len(starts)) if i == 0 or rows[i] != rows[i - 1]]
        return cls(tuple(starts[i] for i in kept), tuple(rows[i] for i in kept))

    def phase(self, step: int) -> int:
        """Number of the phase that ``step`` belongs to."""
        return bisect_right(self.starts, step) - 1


def _weight_at(changes: Sequence[tuple[int, float]], step: int) -> float:
    weight = 0.0
    for start, value in changes:
        if start <= step:
            weight = value
    return weight


class Ordered(Protocol):
    """The samples of one lane of a data set in order."""

    def resolve(self, cursor: Cursor) -> tuple[Place, Cursor]:
        """The sample at ``cursor`` and the cursor after it."""


class LaneSequence:
    """The samples of one lane over all data sets.

    Args:
        sources: Order of the lane in each data set.
        max_epochs: Of each data set; None goes on for ever.
        schedule: Weights of the data sets over steps.
        lane: This lane.
    """

    def __init__(
        self, sources: Sequence[Ordered], max_epochs: Sequence[int | None], schedule: Schedule, lane: int
    ) -> None:
        self._sources, self._max_epochs = sources, max_epochs
        self._schedule, self._lane = schedule, lane
        self._mixtures: dict[tuple[int, int], Mixture | None] = {}

    def draw(self, position: StreamPosition, step: int) -> tuple[Drawn | None, StreamPosition]:
        """The sample that is drawn for ``step``, and the position behind it; None when every data set is used up."""
        phase = self._schedule.phase(step)
        if phase != position.phase:
            position = _begin_phase(position, phase, position.exhausted)
        while (mixture := self._mixture(position.phase, position.exhausted)) is not None:
            chosen = mixture.choose(position.draws)
            place, after = self._sources[chosen].resolve(position.cursors[chosen])
            most = self._max_epochs[chosen]
            if most is not None and place.epoch >= most:
                position = _begin_phase(position, position.phase, position.exhausted | 1 << chosen)
                continue
            draws, cursors = position.draws, position.cursors
            behind = StreamPosition(
                (*draws[:chosen], draws[chosen] + 1, *draws[chosen + 1 :]),
                (*cursors[:chosen], after, *cursors[chosen + 1 :]),
                position.phase,
                position.exhausted,
            )
            return Drawn(chosen, place.epoch, place.sample), behind
        return None, position

    def is_current(self, position: StreamPosition, step: int) -> bool:
        """Whether what was drawn up to ``position`` would be drawn for ``step`` too."""
        return position.phase == self._schedule.phase(step)

    def _mixture(self, phase: int, exhausted: int) -> Mixture | None:
        """The mixture of what is left in a phase; None if nothing is."""
        key = (phase, exhausted)
        if key not in self._mixtures:
            weights = [0.0 if exhausted >> i & 1 else w for i, w in enumerate(self._schedule.weights[phase])]
            self._mixtures[key] = Mixture(weights, self._lane) if any(weights) else None
        return self._mixtures[key]


def _begin_phase(position: StreamPosition, phase: int, exhausted: int) -> StreamPosition:
    """The position at the beginning of another mixture: draws are counted anew."""
    return StreamPosition((0,) * len(position.draws), position.cursors, phase, exhausted)
