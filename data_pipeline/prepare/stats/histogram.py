"""Histogram of any number of whole numbers in a few kilobytes, with quantiles.

Numbers below 256 have a bucket each. Above, the width of a bucket is at most 1/128 of its numbers, so the error of a
quantile is at most 1/256 of its value. Count, sum, smallest and largest are exact. The order of additions and merges
does not change the result, so different processes may count parts of a data set.

Source: G. Tene, HdrHistogram (log-linear buckets). Not for: fractions; scale them to whole numbers (``per_unit``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
_BITS = 7
_HALF = 1 << _BITS
_EXACT = 2 * _HALF


@dataclass
class Histogram:
    """Counts of numbers by bucket.

    Attributes:
        per_unit: Factor by which the values were multiplied to get whole numbers; ``summary`` divides by it.
        count: Number of values.
        total: Sum of the values.
        smallest: Smallest value; 0 if there is none.
        largest: Largest value; 0 if there is none.
        buckets: Number of values in each bucket.
    """

    per_unit: float = 1.0
    count: int = 0
    total: int = 0
    smallest: int = 0
    largest: int = 0
    buckets: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, values: npt.NDArray[Any] | Sequence[int]) -> None:
        """Count whole numbers; each must be at least 0."""
        array = np.asarray(values, np.int64)
        if not array.size:
            return
        counted = np.bincount(_bucket(array)).astype(np.int64)
        exact_sum = int(array.sum()) if int(array.max()) < 2**63 // array.size else sum(array.tolist())
        self._join(int(array.size), exact_sum, int(array.min()), int(array.max()), counted)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram; both must have the same ``per_unit``."""
        if other.count:
            self._join(other.count, other.total, other.smallest, other.largest, other.buckets)

    def _join(self, count: int, total: int, smallest: int, largest: int, buckets: npt.NDArray[np.int64]) -> None:
        self.smallest = min(self.smallest, smallest) if self.count else smallest
        self.largest = max(self.largest, largest)
        self.count += count
        self.total += total
        if len(buckets) > len(self.buckets):
            self.buckets, buckets = buckets.copy(), self.buckets
        self.buckets[: len(buckets)] += buckets

    def quantile(self, share: float) -> float:
        """Return the number that ``share`` of all numbers do not exceed, not divided by ``per_unit``; 0 if empty.

        Above 255 the result is the middle of a bucket.
        """
        rank = max(1, math.ceil(share * self.count))
        bucket = int(np.searchsorted(np.cumsum(self.buckets), rank))
        low, width = bounds(bucket)
        return float(min(max(low + (width - 1) / 2, self.smallest), self.largest))

    def summary(self) -> dict[str, float]:
        """Return count, sum, mean, extremes and quantiles; an empty histogram has only the count.

        All but the count are divided by ``per_unit``.
        """
        if not self.count:
            return {"count": 0}
        unit = self.per_unit
        found = {
            "count": self.count,
            "sum": self.total / unit if unit != 1 else self.total,
            "mean": round(self.total / self.count / unit, 4),
            "min": self.smallest / unit,
            **{name: self.quantile(share) / unit for name, share in QUANTILES.items()},
            "max": self.largest / unit,
        }
        return {name: int(value) if float(value).is_integer() else value for name, value in found.items()}

    def bars(self, edges: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Return how many numbers are between consecutive ``edges``, estimated evenly within a bucket.

        Args:
            edges: Ascending, in units (values divided by ``per_unit``).
        """
        filled = np.flatnonzero(self.buckets)
        spans = np.array([bounds(int(bucket)) for bucket in filled], np.float64).reshape(-1, 2)
        low = np.maximum(spans[:, 0], self.smallest)
        high = np.minimum(spans.sum(axis=1), self.largest + 1)
        counts = self.buckets[filled].astype(np.float64)
        below = np.clip((edges[:, None] * self.per_unit - low) / (high - low), 0, 1) @ counts
        return np.asarray(np.diff(below))


def bounds(bucket: int) -> tuple[int, int]:
    """Return the first number and the width of a bucket."""
    if bucket < _EXACT:
        return bucket, 1
    shift = bucket // _HALF - 1
    return (bucket - shift * _HALF) << shift, 1 << shift


def _bucket(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # float64 rounds above 2**53, so a number just below a power of two may be counted as that power.
    shift = np.maximum(np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1 - _BITS, 0)
    return shift * _HALF + (values >> shift)
