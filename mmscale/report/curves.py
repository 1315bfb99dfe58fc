"""From the lines of ``metrics.jsonl`` to curves that can be drawn: cleaned, smoothed, thinned."""

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
    """The steps from ``first`` to ``last`` (both included) belong to a stage."""

    name: str
    first: int
    last: int


def stage_marks(records: Sequence[Record]) -> list[StageMark]:
    """The stages in the order they ran; records without one belong to a stage without a name."""
    runs: list[tuple[str, int, int]] = []
    for record in records:
        name, step = str(record.get("stage") or ""), int(record["step"])
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], step)
        else:
            runs.append((name, step, step))
    return [StageMark(*run) for run in runs]


def series(records: Sequence[Record], key: str) -> list[Point]:
    """(step, value) wherever a record has a finite number under ``key``."""
    return _points(records, column(records, key))


def column(records: Sequence[Record], key: str) -> Column:
    """Return the value of each record under ``key``; NaN where that is no finite number."""
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
    """The value as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # An integer beyond float64.
        return None
    return number if math.isfinite(number) else None


def smooth(points: Sequence[Point], window: float | None = None) -> list[Point]:
    """Mean with weights that fall off on both sides, by half within about ``window / 3`` points.

    Looking back alone would lag behind a falling curve. By default the window is a sixtieth of the curve, at least 4.
    """
    decay = 1 - 1 / (window or max(4.0, len(points) / 60))
    values = [value for _, value in points]
    above = _two_sided(values, decay)
    below = _two_sided([1.0] * len(values), decay)
    return [(step, a / b) for (step, _), a, b in zip(points, above, below, strict=True)]


def _two_sided(values: Sequence[float], decay: float) -> list[float]:
    """Sum over j of ``decay ** |i - j| * values[j]``, for every i."""
    forwards, backwards = _decayed(values, decay), _decayed(values[::-1], decay)[::-1]
    return [a + b - value for a, b, value in zip(forwards, backwards, values, strict=True)]


def _decayed(values: Sequence[float], decay: float) -> list[float]:
    sums, last = [], 0.0
    for value in values:
        last = decay * last + value
        sums.append(last)
    return sums


def thin(points: Sequence[Point], limit: int = 600) -> list[Point]:
    """At most ``limit`` points that keep every spike: the lowest and the highest of each bucket, in order."""
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
    """Count per second of each step."""
    return _points(records, quotient(records, count_key, "seconds"))


def data_wait_percent(records: Sequence[Record]) -> list[Point]:
    """Share of each step spent waiting for data, in percent."""
    return _points(records, np.minimum(100.0, 100 * quotient(records, "data_wait_seconds", "seconds")))


def quotient(records: Sequence[Record], above: str, below: str) -> Column:
    """Return one value over another in each record; NaN where one is missing or the lower one is 0."""
    divisor = column(records, below)
    divisor[divisor == 0] = np.nan
    return column(records, above) / divisor
