"""Merge nearby byte ranges into one request, and split long ones into several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Range(NamedTuple):
    """The bytes from ``start`` up to, but not including, ``end``."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def coalesce(ranges: Sequence[Range], gap_bytes: int, max_bytes: int) -> list[Range]:
    """Return sorted disjoint ranges that cover all ``ranges``; empty ranges are dropped.

    Ranges at most ``gap_bytes`` apart are merged if the result has at most ``max_bytes``. Overlapping ranges are always
    merged. A range that is longer than ``max_bytes`` is kept whole; ``split`` divides it.
    """
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if joined:
            first, last = joined[-1]
            if end <= last:
                continue
            if start - last <= gap_bytes and (end - first <= max_bytes or start < last):
                joined[-1] = Range(first, end)
                continue
        joined.append(Range(start, end))
    return joined


def split(whole: Range, max_bytes: int) -> list[Range]:
    """Split a range into as few parts as ``max_bytes`` allows, of equal size up to one byte; an empty one into none."""
    count = -(-whole.size // max_bytes)
    cuts = [whole.start + whole.size * i // count for i in range(count + 1)]
    return [Range(a, b) for a, b in pairwise(cuts)]


def extract(blocks: Sequence[tuple[Range, bytes]], wanted: Range) -> bytes:
    """Return the bytes of ``wanted`` from the block that covers it, which must exist unless ``wanted`` is empty."""
    if wanted.start == wanted.end:
        return b""
    for (start, end), data in blocks:
        if start <= wanted.start and wanted.end <= end:
            return data[wanted.start - start : wanted.end - start]
    raise AssertionError(f"no block covers bytes {wanted.start}-{wanted.end}")
