"""Convert the lines of ``metrics.jsonl`` to curves for drawing: finite, smoothed, thinned."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_LARGEST = int(sys.float_info.max)
Point = tuple[float, float]
Record = Mapping[str, Any]
Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StageMark:
    """The steps of one stage, from ``first`` to ``last`` (both included)."""

    name: str
    first: int
    last: int


def stage_marks(records: Sequence[Record]) -> list[StageMark]:
    """Return the stages in the order of training; records without a stage form one with an empty name."""
    stages: list[tuple[str, int, int]] = []
    for record in records:
        name, step = str(record.get("stage") or ""), int(record["step"])
        if stages and stages[-1][0] == name:
            stages[-1] = (name, stages[-1][1], step)
        else:
            stages.append((name, step, step))
    return [StageMark(*stage) for stage in stages]


def series(records: Sequence[Record], key: str) -> list[Point]:
    """Return (step, value) of each record with a finite number under ``key``."""
    return _points(records, column(records, key))


def column(records: Sequence[Record], key: str) -> Column:
    """Return the value of each record under ``key``; NaN for a missing value or one that is not a finite number."""
    values = [record.get(key) for record in records]
    numbers = [
        float(value) if type(value) is float or (type(value) is int and abs(value) <= _LARGEST) else math.nan
        for value in values
    ]
    found = np.array(numbers, np.float64)
    found[~np.isfinite(found)] = np.nan
    return found


def total(records: Sequence[Record], key: str) -> float:
    """Return the sum of the finite values under ``key``."""
    return float(np.nansum(column(records, key)))


def _points(records: Sequence[Record], values: Column) -> list[Point]:
    known = ~np.isnan(values)
    return list(zip(column(records, "step")[known].tolist(), values[known].tolist(), strict=True))


def finite(value: Any) -> float | None:
    """Return the value as a float, or None unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # An integer beyond float64.
        return None
    return number if math.isfinite(number) else None


def smooth(points: Sequence[Point], window: float | None = None) -> list[Point]:
    """Return an exponentially weighted mean over points on both sides, so that it does not lag a falling curve.

    Args:
        points: The curve.
        window: Points after which a weight has fallen to 1/e, about; by default 1/60 of the curve, at least 4.
    """
    decay = 1 - 1 / (window or max(4.0, len(points) / 60))
    values = [value for _, value in points]
    above = _two_sided(values, decay)
    below = _two_sided([1.0] * len(values), decay)
    return [(step, a / b) for (step, _), a, b in zip(points, above, below, strict=True)]


def _two_sided(values: Sequence[float], decay: float) -> list[float]:
    """Return the sum over j of ``decay ** |i - j| * values[j]``, for every i."""
    forwards, backwards = _decayed(values, decay), _decayed(values[::-1], decay)[::-1]
    return [a + b - value for a, b, value in zip(forwards, backwards, values, strict=True)]


def _decayed(values: Sequence[float], decay: float) -> list[float]:
    sums, last = [], 0.0
    for value in values:
        last = decay * last + value
        sums.append(last)
    return sums


def thin(points: Sequence[Point], limit: int = 600) -> list[Point]:
    """Return at most ``limit`` points that keep every spike: the lowest and the highest of each bucket, in order."""
    if len(points) <= limit:
        return list(points)
    values = np.array([value for _, value in points])
    bounds = np.arange(limit // 2 + 1) * len(points) // (limit // 2)
    kept: list[Point] = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        inside = values[start:end]
        kept += [points[start + index] for index in sorted({int(inside.argmin()), int(inside.argmax())})]
    return kept


def rate(records: Sequence[Record], count_key: str) -> list[Point]:
    """Return (step, count per second) of each step with both values."""
    return _points(records, quotient(records, count_key, "seconds"))


def data_wait_percent(records: Sequence[Record]) -> list[Point]:
    """Return (step, percentage of its time spent waiting for data), at most 100."""
    return _points(records, np.minimum(100.0, 100 * quotient(records, "data_wait_seconds", "seconds")))


def quotient(records: Sequence[Record], above: str, below: str) -> Column:
    """Return the quotient of two values of each record; NaN if one is missing or the divisor is 0."""
    divisor = column(records, below)
    divisor[divisor == 0] = np.nan
    return column(records, above) / divisor
