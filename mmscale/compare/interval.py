"""Means over seeds and how far they can be trusted: Student's t, since seeds are few.

What an interval covers is the draw of the seed: first values, order of the data, augmentation. It says nothing about
other data. Differences between two variants are taken seed by seed first: both began alike and saw the same samples, so
what a seed does to both falls out.

Source: Student 1908, "The probable error of a mean"; Abramowitz and Stegun 1964, 26.7.3 and 26.7.4 (distribution).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """The mean of ``n`` values.

    Attributes:
        low, high: Confidence interval of the mean; None of one value, which shows no spread.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width."""
        return None if self.high is None else self.high - self.mean


def mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Mean of at least one value with its t interval."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = t_quantile(confidence, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with ``P(|T| <= t) = confidence``.

    Args:
        confidence: In (0, 1).
        degrees: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while t_share(high, degrees) < confidence:
        high *= 2
    for _ in range(200):  # Halves down to the last bit.
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, degrees) < confidence else (low, middle)
    return high


def t_share(t: float, degrees: int) -> float:
    """``P(|T| <= t)``: for whole degrees of freedom a finite sum."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    share = math.sin(angle) * total
    return 2 / math.pi * (angle + share) if odd else share
