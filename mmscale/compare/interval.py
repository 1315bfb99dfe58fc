"""Means over seeds with confidence intervals by Student's t, because there are few seeds.

An interval covers the variation by seed: initial values, order of the data, augmentation. It does not cover other data.
For two variants, compute the differences seed by seed first. With one seed both start alike and see the same samples,
so effects that the seed has on both cancel.

Source: Student 1908, "The probable error of a mean"; Abramowitz and Stegun 1964, 26.7.3 and 26.7.4 (distribution).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Mean of ``n`` values with a confidence interval.

    Attributes:
        low, high: Bounds of the interval; None for a single value.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Return the mean of at least one value with its t interval. ``confidence`` is in (0, 1)."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(confidence: float, degrees: int) -> float:
    """Return the t with ``P(|T| <= t) = confidence``.

    Args:
        confidence: In (0, 1).
        degrees: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while t_share(high, degrees) < confidence:
        high *= 2
    for _ in range(200):  # Enough bisections for full float precision.
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, degrees) < confidence else (low, middle)
    return high


def t_share(t: float, degrees: int) -> float:
    """Return ``P(|T| <= t)``. For integer degrees of freedom it is a finite sum."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share
