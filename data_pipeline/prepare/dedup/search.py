"""Equal keys, and all pairs of 64-bit hashes at a Hamming distance of at most D, without comparing all with all.

The pigeonhole argument: cut the 64 bits into D + r blocks. D flipped bits leave at least r blocks as they are, so two
near hashes agree in one of the C(D + r, r) choices of r blocks. For each choice the hashes are sorted by the bits of
those blocks and compared within runs of equal bits. Every near pair is found, none is made up; a larger r means more
sortings and shorter runs, so r follows from the number of hashes.

Source: Manku, Jain, Das Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007, section 3; Norouzi, Punjani,
Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012. Not for: what is kept (``greedy``).
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
"""Beyond, unrelated images are as near as copies, and every choice of blocks leaves runs as long as the whole."""
ROWS_AT_ONCE = 1 << 26
"""Hashes that are sorted together: what a process holds is about 64 bytes times this, 4.3 GB."""
_COMPARED_AT_ONCE = 1 << 22
_MAX_BLOCKS_EQUAL = 6
# Nanoseconds of sorting a hash, for each doubling of their number, and of comparing two; only their ratio matters.
_SORT_NS, _COMPARE_NS = 4.0, 10.0

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


def num_parts(num_rows: int) -> int:
    """Parts by key, so that one of them fits into memory."""
    return max(1, -(-num_rows // ROWS_AT_ONCE))


def equal_rows(keys: Words, rows: Rows) -> tuple[Rows, Rows]:
    """Places in ``rows`` whose key came before, and the place where it came first.

    Args:
        keys: uint64 ``(N, words)``, may be mapped.
        rows: int64 ``(R,)`` into ``keys``, in the order that decides what is first.

    Returns:
        Two int64 arrays of one length, unsorted.
    """
    parts = num_parts(len(rows))
    found = [_equal_in_part(keys, rows, part, parts) for part in range(parts)]
    later, first = zip(*found, strict=True)
    return np.concatenate(later), np.concatenate(first)


def _equal_in_part(keys: Words, rows: Rows, part: int, parts: int) -> tuple[Rows, Rows]:
    places, chosen = [], []
    for start in range(0, len(rows), _COMPARED_AT_ONCE):
        piece = keys[rows[start : start + _COMPARED_AT_ONCE]]
        inside = np.flatnonzero(_part_of(piece[:, 0], parts) == part)
        places.append(inside + start)
        chosen.append(piece[inside])
    if not places:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    place, key = np.concatenate(places), np.concatenate(chosen)
    del places, chosen, piece  # Half of the memory that a part takes.
    order = np.lexsort(key.T)  # Stable: equal keys stay in the order of places.
    place, key = place[order], key[order]
    is_new = np.ones(len(place), bool)
    is_new[1:] = (key[1:] != key[:-1]).any(axis=1)
    first = place[np.maximum.accumulate(np.where(is_new, np.arange(len(place)), 0))]
    return place[~is_new], first[~is_new]


def _part_of(keys: Words, parts: int) -> Words:
    """Which part a key belongs to: keys that are equal in all bits stay together, others are spread evenly."""
    mixed = keys * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: high bits depend on all bits.
    return (mixed >> np.uint64(40)) % np.uint64(parts)


@dataclass(frozen=True)
class Plan:
    """How the bits are cut.

    Attributes:
        num_blocks: Blocks of bits.
        num_equal: Blocks that two near hashes surely share.
    """

    num_blocks: int
    num_equal: int

    @classmethod
    def of(cls, num_hashes: int, distance: int) -> Plan:
        """The cheapest one for so many hashes, evenly spread."""
        choices = [cls(distance + equal, equal) for equal in range(1, _MAX_BLOCKS_EQUAL + 1)]
        return min(choices, key=lambda plan: plan.nanoseconds(num_hashes))

    def nanoseconds(self, num_hashes: int) -> float:
        """An estimate, on one core."""
        runs = 2.0 ** (BITS * self.num_equal / self.num_blocks)
        each = _SORT_NS * math.log2(num_hashes + 1) + _COMPARE_NS * num_hashes / runs / 2
        return math.comb(self.num_blocks, self.num_equal) * num_hashes * each

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The bits of each block, as masks."""
        cuts = [round(BITS * i / self.num_blocks) for i in range(self.num_blocks + 1)]
        return tuple((1 << end) - (1 << start) for start, end in pairwise(cuts))

    @cached_property
    def choices(self) -> tuple[tuple[int, ...], ...]:
        """Which blocks are to be equal, choice after choice."""
        return tuple(combinations(range(self.num_blocks), self.num_equal))


@dataclass(frozen=True)
class NearTask:
    """One choice of blocks, and one part of the keys."""

    number: int
    choice: tuple[int, ...]
    part: int


class NearPairs(NamedTuple):
    """Some near pairs of task ``number``: int64 ``(pairs, 2)``, the later and the earlier place of each, unsorted."""

    number: int
    pairs: Rows
    is_last: bool = False


@dataclass(frozen=True)
class NearWork:
    """Finds the near pairs of a task: the work of a process (``ordered_pool.in_order``).

    Attributes:
        values: A ``.npy`` file of distinct hashes, uint64 ``(M,)``; mapped.
        plan: The cut.
        distance: Bits that may differ.
    """

    values: Path
    plan: Plan
    distance: int

    def tasks(self, num_hashes: int) -> list[NearTask]:
        """All of them; each pair is found by just one."""
        every = product(self.plan.choices, range(num_parts(num_hashes)))
        return [NearTask(number, choice, part) for number, (choice, part) in enumerate(every)]

    def __call__(self, task: NearTask) -> Iterator[NearPairs]:
        """The near pairs of a task, in pieces."""
        values: Words = np.load(self.values, mmap_mode="r", allow_pickle=False)
        mask = np.uint64(sum(self.plan.blocks[block] for block in task.choice))
        place, value = _sorted_part(values, mask, task.part, num_parts(len(values)))
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
                    pair = np.stack([place[a[near]], place[a[near] + step]], axis=1)
                    yield NearPairs(task.number, np.stack([pair.max(axis=1), pair.min(axis=1)], axis=1))
                step += 1
        yield NearPairs(task.number, np.zeros((0, 2), np.int64), is_last=True)

    def _is_first_choice(self, differing: Words, choice: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """A pair that agrees in more than ``num_equal`` blocks is met several times and counts the first time."""
        before = [(differing & np.uint64(self.plan.blocks[block])) == 0 for block in range(choice[-1])]
        return np.sum(before, axis=0, dtype=np.int64) == len(choice) - 1 if before else np.ones(len(differing), bool)


def _sorted_part(values: Words, mask: np.uint64, part: int, parts: int) -> tuple[Rows, Words]:
    if parts == 1:
        order = np.argsort(values & mask, kind="stable")
        return order, values[order]
    places = []
    for start in range(0, len(values), _COMPARED_AT_ONCE):
        piece = values[start : start + _COMPARED_AT_ONCE] & mask
        places.append(np.flatnonzero(_part_of(piece, parts) == part) + start)
    place = np.concatenate(places)
    value = values[place]
    order = np.argsort(value & mask, kind="stable")
    return place[order], value[order]


def greedy(pairs: Rows, num_protected: int) -> tuple[Rows, Rows]:
    """Which places to leave out so that no two near ones stay, earlier ones before later ones.

    A place goes if an earlier one that stays is near: what goes is always near something that stays, never near it by
    way of a chain of others. The first ``num_protected`` places stay in any case.

    Args:
        pairs: int64 ``(pairs, 2)``: later, earlier.

    Returns:
        (places that go, ascending; the first near place that stays for each).
    """
    pairs = pairs[pairs[:, 0] >= num_protected]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    gone = bytearray(int(pairs[-1, 0]) + 1 if len(pairs) else 0)
    places, near = array("q"), array("q")
    for start in range(0, len(pairs), _COMPARED_AT_ONCE):
        for later, earlier in pairs[start : start + _COMPARED_AT_ONCE].tolist():
            if not gone[later] and not gone[earlier]:
                gone[later] = True
                places.append(later)
                near.append(earlier)
    return np.array(places, np.int64), np.array(near, np.int64)
