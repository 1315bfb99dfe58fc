"""Histograms agree with numpy on the numbers themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.prepare.stats.histogram import QUANTILES, Histogram, bounds

numbers = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**62)), min_size=1, max_size=60)


@given(values=numbers, cut=st.integers(0, 60))
def test_summaries_agree_with_numpy(values: list[int], cut: int) -> None:
    first, second = Histogram(), Histogram()
    first.add(values[:cut])
    second.add(np.array(values[cut:], np.int64))
    first.merge(second)
    assert (first.count, first.total, first.smallest, first.largest) == (
        len(values),
        sum(values),
        min(values),
        max(values),
    )
    for share in QUANTILES.values():
        true = float(np.quantile(np.array(values, np.float64), share, method="inverted_cdf"))
        assert first.quantile(share) == pytest.approx(true, rel=1 / 256, abs=0)
        if true < 256:
            assert first.quantile(share) == true


@given(values=st.lists(st.integers(0, 2**40), max_size=50), order=st.randoms())
def test_the_order_of_parts_does_not_matter(values: list[int], order: object) -> None:
    whole, parts = Histogram(), Histogram()
    whole.add(values)
    for value in sorted(values):
        part = Histogram()
        part.add([value])
        parts.merge(part)
    assert whole.summary() == parts.summary()


def test_buckets_are_adjacent() -> None:
    end = 0
    for bucket in range(57 * 128):
        low, width = bounds(bucket)
        assert low == end
        assert low < 256 or width <= low / 128
        end = low + width


@given(values=st.lists(st.integers(0, 5000), min_size=1, max_size=80))
def test_bars_hold_every_number(values: list[int]) -> None:
    histogram = Histogram(per_unit=10)
    histogram.add(values)
    bars = histogram.bars(np.array([0, 5, 20, 100, 600.0]))
    assert bars.sum() == pytest.approx(len(values))
    assert bars[0] == pytest.approx(sum(value < 50 for value in values))  # Below 256 a number has a bucket of its own.


def test_summaries_are_in_units_and_an_empty_one_has_no_quantiles() -> None:
    histogram = Histogram(per_unit=1000)
    assert histogram.summary() == {"count": 0}
    histogram.add([500, 2000])
    assert histogram.summary()["min"] == 0.5
    assert histogram.summary()["mean"] == 1.25
    assert histogram.summary()["max"] == 2
