"""Intervals agree with the integrated density of Student's t and with printed tables."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.compare.interval import mean_interval, t_quantile, t_share

# Two-sided 95 %: the column t.975 of any printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "printed"), TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees: int, printed: float) -> None:
    assert round(t_quantile(0.95, degrees), 3) == printed


@given(st.integers(1, 40), st.floats(0.05, 6))
def test_the_share_is_the_integral_of_the_density(degrees: int, t: float) -> None:
    x = np.linspace(0, t, 20_001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    assert t_share(t, degrees) == pytest.approx(2 * np.trapezoid(density, x), abs=1e-8)


@given(st.integers(1, 200), st.floats(0.01, 0.999))
def test_quantile_and_share_are_inverse(degrees: int, confidence: float) -> None:
    assert t_share(t_quantile(confidence, degrees), degrees) == pytest.approx(confidence, abs=1e-12)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(5, 2, (4000, 3))
    intervals = [mean_interval(row.tolist(), 0.9) for row in draws]
    held = sum(each.low < 5 < each.high for each in intervals if each.low is not None and each.high is not None)
    assert held / len(draws) == pytest.approx(0.9, abs=0.015)  # Three standard errors.


def test_one_value_has_no_interval_and_three_have_the_formula() -> None:
    assert (mean_interval([3.0], 0.95).low, mean_interval([3.0], 0.95).half) == (None, None)
    values = [1.0, 2.0, 6.0]
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert mean_interval(values, 0.95).half == pytest.approx(half, rel=1e-3)
