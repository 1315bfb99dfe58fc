"""From the lines of ``metrics.jsonl`` to curves that can be drawn: cleaned, smoothed, thinned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

Point = tuple[float, float]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class StageMark:
    """The steps from ``first`` to ``last`` (both included) belong to a stage."""

    name: str
    first: int
    last: int


def stage_marks(records: Sequence[Record]) -> list[StageMark]:
    """The stages in the order they ran; records without one belong to a stage without a name."""
    marks: list[StageMark] = []
    for record in records:
        name, step = str(record.get("stage") or ""), int(record["step"])
        if marks and marks[-1].name == name:
            marks[-1] = StageMark(name, marks[-1].first, step)
        else:
            marks.append(StageMark(name, step, step))
    return marks


def series(records: Sequence[Record], key: str) -> list[Point]:
    """(step, value) wherever a record has a finite number under ``key``."""
    return [(float(record["step"]), value) for record in records if (value := finite(record.get(key))) is not None]


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
    return list(accumulate(values, lambda total, value: decay * total + value))


def thin(points: Sequence[Point], limit: int = 600) -> list[Point]:
    """At most ``limit`` points that keep every spike: the lowest and the highest of each bucket, in order."""
    if len(points) <= limit:
        return list(points)
    num_buckets = limit // 2
    kept: list[Point] = []
    for bucket in range(num_buckets):
        start, end = (len(points) * i // num_buckets for i in (bucket, bucket + 1))
        inside = points[start:end]
        extremes = {min(inside, key=lambda p: p[1]), max(inside, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return kept


def rate(records: Sequence[Record], count_key: str) -> list[Point]:
    """Count per second of each step."""
    return _quotient(records, count_key, "seconds")


def data_wait_percent(records: Sequence[Record]) -> list[Point]:
    """Share of each step spent waiting for data, in percent."""
    return [(step, min(100.0, 100 * value)) for step, value in _quotient(records, "data_wait_seconds", "seconds")]


def _quotient(records: Sequence[Record], above: str, below: str) -> list[Point]:
    points = []
    for record in records:
        a, b = finite(record.get(above)), finite(record.get(below))
        if a is not None and b:
            points.append((float(record["step"]), a / b))
    return points
