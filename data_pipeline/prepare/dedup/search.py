"""Find equal keys, and all pairs of 64-bit hashes within Hamming distance D, without comparing every pair.

The search uses the pigeonhole principle. Cut the 64 bits into D + r blocks. At most D flipped bits leave at least r
blocks unchanged, so two near hashes agree in one of the C(D + r, r) choices of r blocks. For each choice, sort the
hashes by the bits of those blocks and compare the hashes within runs of equal bits. The result is exact. A larger r
means more sorts and shorter runs, so r is chosen from the number of hashes.

Source: Manku, Jain, Das Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007, section 3; Norouzi, Punjani,
Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012. ``greedy`` then chooses the positions to
remove.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BITS = 64
MAX_DISTANCE = 16
"""At larger distances unrelated images match too, and the runs are too long for a fast search."""
ROWS_AT_ONCE = 1 << 26
"""Hashes that are sorted together. A process needs about 64 bytes for each, 4.3 GB."""
_COMPARED_AT_ONCE = 1 << 22
_MAX_BLOCKS_EQUAL = 6
# Nanoseconds to sort a hash (times log2 of their number) and to compare two. Only their ratio matters.
_SORT_NS, _COMPARE_NS = 4.0, 10.0

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def num_parts(num_rows: int) -> int:
    """Return the number of parts that the keys are split into, so that one part fits into memory."""
    return max(1, -(-num_rows // ROWS_AT_ONCE))


def equal_rows(keys: Words, rows: Indices) -> tuple[Indices, Indices]:
    """Find the positions in ``rows`` whose key occurred at an earlier position.

    Args:
        keys: uint64 ``(N, words)``; may be memory-mapped.
        rows: int64 ``(R,)``, indices into ``keys``; their order decides which occurrence is the first.

    Returns:
        Two int64 arrays of one length, unsorted: the repeated positions, and the first position of each one's key.
    """
    parts = num_parts(len(rows))
    found = [_equal_in_part(keys, rows, part, parts) for part in range(parts)]
    later, first = zip(*found, strict=True)
    return np.concatenate(later), np.concatenate(first)


def _equal_in_part(keys: Words, rows: Indices, part: int, parts: int) -> tuple[Indices, Indices]:
    positions, chosen = [], []
    for start in range(0, len(rows), _COMPARED_AT_ONCE):
        block_rows = keys[rows[start : start + _COMPARED_AT_ONCE]]
        inside = np.flatnonzero(_part_of(block_rows[:, 0], parts) == part)
        positions.append(inside + start)
        chosen.append(block_rows[inside])
    if not positions:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    position, key = np.concatenate(positions), np.concatenate(chosen)
    del positions, chosen, block_rows  # Free half of a part's memory before the sort.
    order = np.lexsort(key.T)  # Stable: equal keys stay in the order of positions.
    position, key = position[order], key[order]
    is_new = np.ones(len(position), bool)
    is_new[1:] = (key[1:] != key[:-1]).any(axis=1)
    first = position[np.maximum.accumulate(np.where(is_new, np.arange(len(position)), 0))]
    return position[~is_new], first[~is_new]


def _part_of(keys: Words, parts: int) -> Words:
    """Return the part of each key: equal keys get the same part, different keys are spread evenly."""
    mixed = keys * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: high bits depend on all bits.
    return (mixed >> np.uint64(40)) % np.uint64(parts)


@dataclass(frozen=True)
class BlockPlan:
    """Division of the 64 bits into blocks.

    Attributes:
        num_blocks: Number of blocks.
        num_equal: Smallest number of blocks in which two near hashes agree.
    """

    num_blocks: int
    num_equal: int

    @classmethod
    def of(cls, num_hashes: int, distance: int) -> BlockPlan:
        """Return the cheapest plan for ``num_hashes`` evenly distributed hashes."""
        choices = [cls(distance + equal, equal) for equal in range(1, _MAX_BLOCKS_EQUAL + 1)]
        return min(choices, key=lambda plan: plan.nanoseconds(num_hashes))

    def nanoseconds(self, num_hashes: int) -> float:
        """Return the estimated time of the search on one core."""
        runs = 2.0 ** (BITS * self.num_equal / self.num_blocks)
        each = _SORT_NS * math.log2(num_hashes + 1) + _COMPARE_NS * num_hashes / runs / 2
        return math.comb(self.num_blocks, self.num_equal) * num_hashes * each

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Bit mask of each block."""
        cuts = [round(BITS * i / self.num_blocks) for i in range(self.num_blocks + 1)]
        return tuple((1 << end) - (1 << start) for start, end in pairwise(cuts))

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """All choices of ``num_equal`` block numbers."""
        return tuple(combinations(range(self.num_blocks), self.num_equal))


@dataclass(frozen=True)
class NearTask:
    """One choice of blocks, and one part of the keys."""

    number: int
    choice: tuple[int, ...]
    part: int


class NearPairs(NamedTuple):
    """A batch of near pairs of task ``number``: int64 ``(pairs, 2)``, later and earlier position of each, unsorted."""

    number: int
    pairs: Indices
    is_last: bool = False


@dataclass(frozen=True)
class NearWork:
    """Finds the near pairs of a task; run by worker processes (``ordered_pool.in_order``).

    Attributes:
        values: A ``.npy`` file of distinct hashes, uint64 ``(M,)``; it is memory-mapped.
        plan: Division of the bits into blocks.
        distance: Largest number of differing bits of a near pair.
    """

    values: Path
    plan: BlockPlan
    distance: int

    def tasks(self, num_hashes: int) -> list[NearTask]:
        """Return all tasks. Each near pair is found by exactly one of them."""
        every = product(self.plan.choices, range(num_parts(num_hashes)))
        return [NearTask(number, choice, part) for number, (choice, part) in enumerate(every)]

    def __call__(self, task: NearTask) -> Iterator[NearPairs]:
        """Yield the near pairs of a task in batches; the last batch is empty and has ``is_last``."""
        values: Words = np.load(self.values, mmap_mode="r", allow_pickle=False)
        mask = np.uint64(sum(self.plan.blocks[block] for block in task.choice))
        position, value = _sorted_part(values, mask, task.part, num_parts(len(values)))
        key = value & mask
        ends = np.append(np.flatnonzero(key[1:] != key[:-1]) + 1, len(key))
        run_end = np.repeat(ends, np.diff(ends, prepend=0))
        for start in range(0, len(value), _COMPARED_AT_ONCE):
            a = np.arange(start, min(start + _COMPARED_AT_ONCE, len(value)))
            step = 1
            while len(a := a[run_end[a] > a + step]):
                differing = value[a] ^ value[a + step]
                near = np.flatnonzero(np.bitwise_count(differing) <= self.distance)
                near = near[self._is_first_choice(differing[near], task.choice)]
                if len(near):
                    pair = np.stack([position[a[near]], position[a[near] + step]], axis=1)
                    yield NearPairs(task.number, np.stack([pair.max(axis=1), pair.min(axis=1)], axis=1))
                step += 1
        yield NearPairs(task.number, np.zeros((0, 2), np.int64), is_last=True)

    def _is_first_choice(self, differing: Words, choice: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Whether ``choice`` is the first choice whose blocks all agree. Later choices would find the pair again."""
        before = [(differing & np.uint64(self.plan.blocks[block])) == 0 for block in range(choice[-1])]
        return np.sum(before, axis=0, dtype=np.int64) == len(choice) - 1 if before else np.ones(len(differing), bool)


def _sorted_part(values: Words, mask: np.uint64, part: int, parts: int) -> tuple[Indices, Words]:
    if parts == 1:
        order = np.argsort(values & mask, kind="stable")
        return order, values[order]
    positions = []
    for start in range(0, len(values), _COMPARED_AT_ONCE):
        block_rows = values[start : start + _COMPARED_AT_ONCE] & mask
        positions.append(np.flatnonzero(_part_of(block_rows, parts) == part) + start)
    position = np.concatenate(positions)
    value = values[position]
    order = np.argsort(value & mask, kind="stable")
    return position[order], value[order]


def greedy(pairs: Indices, num_protected: int) -> tuple[Indices, Indices]:
    """Choose the positions to remove so that no two of the kept ones are near, preferring to keep earlier ones.

    A position is removed if it is near an earlier kept position. So every removed position is itself near a kept one;
    a chain of near positions does not count. The first ``num_protected`` positions are always kept.

    Args:
        pairs: int64 ``(pairs, 2)``, near pairs: later position, earlier position.
        num_protected: Number of positions at the start that are never removed.

    Returns:
        The removed positions, ascending, and for each one the first kept position that is near it.
    """
    pairs = pairs[pairs[:, 0] >= num_protected]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    removed = bytearray(int(pairs[-1, 0]) + 1 if len(pairs) else 0)
    positions, near = array("q"), array("q")
    for start in range(0, len(pairs), _COMPARED_AT_ONCE):
        for later, earlier in pairs[start : start + _COMPARED_AT_ONCE].tolist():
            if not removed[later] and not removed[earlier]:
                removed[later] = True
                positions.append(later)
                near.append(earlier)
    return np.array(positions, np.int64), np.array(near, np.int64)
