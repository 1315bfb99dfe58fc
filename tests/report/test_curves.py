from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.report.curves import StageMark, data_wait_percent, rate, series, smooth, stage_marks, thin
from mmscale.report.svg import Bar, Line, bar_chart, line_chart, nice_ticks

curves = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40).map(
    lambda values: [(float(i), v) for i, v in enumerate(values)]
)


@given(curves, st.floats(1.5, 20))
def test_smoothing_is_the_weighted_mean_over_both_sides(points: list[tuple[float, float]], window: float) -> None:
    decay = 1 - 1 / window
    for i, (step, value) in enumerate(smooth(points, window)):
        weights = [decay ** abs(i - j) for j in range(len(points))]
        expected = sum(w * v for w, (_, v) in zip(weights, points, strict=True)) / sum(weights)
        assert step == i
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(curves, st.integers(4, 30))
def test_thinning_keeps_the_extremes_and_the_order(points: list[tuple[float, float]], limit: int) -> None:
    kept = thin(points, limit)
    assert len(kept) <= max(limit, 1)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    values = [value for _, value in points]
    assert {min(values), max(values)} <= {value for _, value in kept}


def test_series_leaves_out_what_cannot_be_drawn() -> None:
    records = [{"step": 1, "loss": 2}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": True}]
    assert series(records, "loss") == [(1.0, 2.0)]


def test_rates_and_waiting() -> None:
    records = [
        {"step": 1, "tokens": 50, "seconds": 2.0, "data_wait_seconds": 0.5},
        {"step": 2, "tokens": 50, "seconds": 0.0, "data_wait_seconds": 0.0},
        {"step": 3, "tokens": 50, "seconds": 1.0, "data_wait_seconds": 1.5},
    ]
    assert rate(records, "tokens") == [(1.0, 25.0), (3.0, 50.0)]
    assert data_wait_percent(records) == [(1.0, 25.0), (3.0, 100.0)]


def test_stages_are_the_runs_of_their_names() -> None:
    records = [{"step": step, "stage": stage} for step, stage in enumerate(["a", "a", "b", "a"], start=1)]
    assert stage_marks(records) == [StageMark("a", 1, 2), StageMark("b", 3, 3), StageMark("a", 4, 4)]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    high = low + span
    if not high > low:
        return
    ticks = nice_ticks(low, high)
    assert len(ticks) <= 6
    assert all(low - 1e-6 * span - 1e-9 <= tick <= high + 1e-6 * span + 1e-9 for tick in ticks)


def test_a_curve_fills_its_frame_from_corner_to_corner() -> None:
    chart = line_chart(
        [Line("loss", [(1, 0.0), (101, 10.0)])], [], format_value=lambda v: f"{v:g}", width=600, from_zero=True
    )
    (points,) = re.findall(r'<polyline class="line c1" points="([^"]+)"', chart)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert x0 < 60 < 580 < x1
    assert y1 < 60 < 180 < y0


def test_several_stages_are_named_and_parted_and_one_is_not() -> None:
    line = [Line("loss", [(1, 1.0), (10, 2.0)])]
    two = line_chart(line, [StageMark("warm <up>", 1, 5), StageMark("all", 6, 10)], format_value=str)
    assert "warm &lt;up&gt;" in two
    assert two.count('class="stage"') == 1
    assert "stage-name" not in line_chart(line, [StageMark("all", 1, 10)], format_value=str)


def test_one_point_and_no_point_are_drawn() -> None:
    assert "<circle" in line_chart([Line("loss", [(1, 1.0)])], [], format_value=str)
    assert "Nothing recorded" in line_chart([Line("loss", [])], [], format_value=str)


def test_bars_are_as_long_as_their_shares() -> None:
    chart = bar_chart([Bar("model", 0.5, 0.0, "score"), Bar("chance", 0.125, 0.0, "chance")])
    lengths = {kind: float(width) for kind, width in re.findall(r'class="bar (\w+)"[^>]*? width="([\d.]+)"', chart)}
    assert lengths["score"] == pytest.approx(4 * lengths["chance"], rel=0.01)
    assert "50.0%" in chart
    assert "12.5%" in chart
