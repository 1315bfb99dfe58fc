"""Byte ranges: neighbours become one request, long ones several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Range(NamedTuple):
    """Bytes ``start`` to ``end``, ``end`` left out."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def coalesce(ranges: Sequence[Range], gap_bytes: int, max_bytes: int) -> list[Range]:
    """Few ranges that cover all ``ranges``, in rising order.

    Neighbours that are at most ``gap_bytes`` apart are joined while the whole has at most ``max_bytes``. A longer
    one stays whole (``pieces`` cuts it). Empty ranges are covered by nothing.
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


def pieces(whole: Range, max_bytes: int) -> list[Range]:
    """``whole`` cut into parts of equal size, one byte more or less, of at most ``max_bytes``."""
    count = -(-whole.size // max_bytes)
    cuts = [whole.start + whole.size * i // count for i in range(count + 1)]
    return [Range(a, b) for a, b in pairwise(cuts)]


def cut(blocks: Sequence[tuple[Range, bytes]], wanted: Range) -> bytes:
    """The bytes of ``wanted`` out of the one of ``blocks`` that covers it; empty for an empty range."""
    if wanted.start == wanted.end:
        return b""
    for (start, end), data in blocks:
        if start <= wanted.start and wanted.end <= end:
            return data[wanted.start - start : wanted.end - start]
    raise AssertionError(f"no block covers bytes {wanted.start}-{wanted.end}")
