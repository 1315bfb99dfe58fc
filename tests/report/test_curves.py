from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.report.charts import Bar, Chart, Line, stage_names
from mmscale.report.curves import StageMark, column, data_wait_percent, rate, series, smooth, stage_marks, thin, total
from mmscale.report.page import render_page
from tests.report.pages import Page

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


def test_a_column_holds_finite_numbers_alone() -> None:
    values = [1, 2.5, True, None, "3", 10**400, float("inf"), -(10**400), float("nan"), [4]]
    records = [{"step": 1, "loss": value} for value in values] + [{"step": 2}]
    np.testing.assert_array_equal(column(records, "loss"), [1, 2.5, *[np.nan] * 9])
    assert total(records, "loss") == 3.5
    assert total([], "loss") == 0


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Page]:
    """Return a function that renders one macro of the charts."""

    def render(call: str, **values: Any) -> Page:
        template = tmp_path / "one.html.jinja"
        template.write_text('{% from "charts.html.jinja" import card, bars with context %}' + f"{{{{ {call} }}}}")
        return Page(render_page(template, **values))

    return render


def test_a_chart_holds_every_point_in_order(draw: Callable[..., Page]) -> None:
    lines = [
        Line("loss", [(1, 0.1), (1_234_567, 10.0)], 2),
        Line("spread", [(2, 0.25)], faint=True, spread=[(0.125, 0.5)]),
        Line("none", []),
    ]
    (drawn,) = draw("card(chart)", chart=Chart("t", "n", lines, "tokens", "%")).charts
    assert drawn["lines"] == [
        {"label": "loss", "colour": 2, "faint": False, "x": [1, 1_234_567], "y": [0.1, 10], "low": [], "high": []},
        {"label": "spread", "colour": 1, "faint": True, "x": [2], "y": [0.25], "low": [0.125], "high": [0.5]},
    ]
    assert (drawn["axis"], drawn["unit"]) == ("tokens", "%")


def test_several_stages_are_named_and_parted_and_one_is_not(draw: Callable[..., Page]) -> None:
    marks = stage_names([StageMark("warm <up>", 1, 5), StageMark("</script>", 6, 10)])
    page = draw("card(chart)", chart=Chart("t", "n", [Line("loss", [(1, 1.0)])], marks=marks))
    assert page.charts[0]["marks"] == [[1, "warm <up>"], [6, "</script>"]]
    assert stage_names([StageMark("all", 1, 10)]) == []


def test_an_empty_chart_is_a_sentence(draw: Callable[..., Page]) -> None:
    page = draw("card(chart)", chart=Chart("t", "n", [Line("loss", [])]))
    assert "Nothing recorded" in page.text
    assert page.charts == []


def test_bars_are_as_long_as_their_shares(draw: Callable[..., Page]) -> None:
    page = draw("bars(shares)", shares=[Bar("model", 0.4, 0.1, 1), Bar("chance", 0.125, 0.0, 0)])
    styles = {a["class"]: a["style"] for _, a in page.tags if "style" in a}
    assert styles == {
        "bar-fill k1": "width:80.0%",
        "whisker": "left:60.0%;right:0.0%",
        "bar-fill k0": "width:25.0%",
    }
    assert "model 40.0% ± 10.0 chance 12.5%" in page.text
