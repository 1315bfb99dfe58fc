"""Which sample sits where: the order of one data set as a pure function of integers.

    samples   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | ...      consecutive samples form blocks
    epoch     block 2, block 0, block 1, ...           a Feistel permutation of the block ids
    lane l    places l, l + L, l + 2L, ... of the endless sequence of blocks
    window    ``window_blocks`` of a lane's blocks, whose samples are permuted among themselves

Nothing is stored and nothing is iterated: any cursor of a set of 10^10 samples is looked up in microseconds, so a
resumed run costs the same as a fresh one, and ``find`` goes back from a sample to its cursor. A lane is a row of the
global batch; ranks and workers own lanes and never change the order. Not for: cryptography.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import DataConfigError
from data_pipeline.order.randomness import Permutation

# Samples of a window that are worked out at once, so that a lane holds 4 KiB of them however large its windows are.
_CHUNK = 512


class Cursor(NamedTuple):
    """A place in one lane of one data set."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


class Place(NamedTuple):
    """What a cursor points at."""

    sample: int
    epoch: int


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
