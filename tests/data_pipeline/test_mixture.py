"""Mixture: counts stay within two draws of the exact share, and lanes are spread."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataConfigError
from data_pipeline.mixture import Mixture


def _run(mixture: Mixture, num_datasets: int, steps: int) -> list[int]:
    draws = [0] * num_datasets
    chosen = []
    for _ in range(steps):
        chosen.append(mixture.choose(draws))
        draws[chosen[-1]] += 1
    return chosen


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=5), lane=st.integers(0, 20))
def test_proportions_are_exact_over_whole_periods(weights: list[int], lane: int) -> None:
    chosen = _run(Mixture(weights, lane), len(weights), sum(weights) * 2)
    assert [chosen.count(i) for i in range(len(weights))] == [2 * weight for weight in weights]


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), steps=st.integers(1, 200))
def test_counts_never_stray_far_from_their_share(weights: list[float], steps: int) -> None:
    chosen = _run(Mixture(weights), len(weights), steps)
    for i, weight in enumerate(weights):
        assert abs(chosen.count(i) - steps * weight / sum(weights)) < max(2, len(weights) - 1)


def test_the_choice_depends_on_the_draws_alone() -> None:
    long = _run(Mixture([0.7, 0.2, 0.1], lane=3), 3, 50)
    draws = [long[:20].count(i) for i in range(3)]
    assert Mixture([0.7, 0.2, 0.1], lane=3).choose(draws) == long[20]


def test_lanes_do_not_draw_the_rare_data_set_at_once() -> None:
    first = [_run(Mixture([0.75, 0.25], lane), 2, 1)[0] for lane in range(8)]
    assert first.count(1) == 2


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [float("nan")], [float("inf")]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataConfigError):
        Mixture(weights)
