"""The mixture: counts are within one draw of the exact share, and lanes start at different positions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataConfigError
from data_pipeline.order.lanes import Mixture, Schedule


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


@given(weights=st.lists(st.one_of(st.integers(1, 50), st.floats(0.01, 10)), min_size=1, max_size=7))
def test_every_count_is_within_one_draw_of_its_share_at_every_place(weights: list[float]) -> None:
    total = sum(Fraction(weight).limit_denominator(10**9) for weight in weights)
    counts = [0] * len(weights)
    for coming, choice in enumerate(_run(Mixture(weights), len(weights), 150), start=1):
        counts[choice] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - coming * Fraction(weight).limit_denominator(10**9) / total) < 1


def _tijdeman(weights: list[int], draws: int) -> list[int]:
    """Return the sequence as the paper defines it, with fractions. The first of equally urgent data sets is next."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    margin = Fraction(1, 2 * len(weights) - 2)
    counts, chosen = [0] * len(weights), []
    for coming in range(1, draws + 1):
        behind = [coming * share - count for share, count in zip(shares, counts, strict=True)]
        ready = [i for i in range(len(weights)) if behind[i] >= margin]
        chosen.append(min(ready, key=lambda i: ((1 - margin - behind[i]) / shares[i], i)))
        counts[chosen[-1]] += 1
    return chosen


# Small weights: many data sets are equally urgent. The order among them is part of every run's order.
@given(weights=st.lists(st.integers(1, 4), min_size=2, max_size=6), lane=st.integers(0, 6))
def test_the_sequence_is_the_papers_and_ties_go_to_the_first(weights: list[int], lane: int) -> None:
    ahead = lane % sum(weights)
    assert _run(Mixture(weights, lane), len(weights), 30) == _tijdeman(weights, 30 + ahead)[ahead:]


def test_lanes_start_at_one_of_the_first_1024_places() -> None:
    weights = [600, 500, 31]
    whole = _tijdeman(weights, 1070)
    for lane in (1, 1023, 1024, 1030, 2048 + 37):
        ahead = lane % 1024
        assert _run(Mixture(weights, lane), 3, 20) == whole[ahead : ahead + 20]


def test_the_sequence_of_some_weights() -> None:
    assert _run(Mixture([1, 1, 1]), 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert _run(Mixture([2, 1, 1]), 3, 8) == [0, 1, 2, 0, 0, 1, 2, 0]


@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=4), draws=st.integers(1, 30))
def test_as_many_lanes_as_the_sequence_has_places_are_together_exact(weights: list[int], draws: int) -> None:
    chosen = [i for lane in range(sum(weights)) for i in _run(Mixture(weights, lane), len(weights), draws)]
    assert [chosen.count(i) for i in range(len(weights))] == [weight * draws for weight in weights]


@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=5), lane=st.integers(0, 300))
def test_a_lane_is_never_two_draws_off_from_its_own_start(weights: list[int], lane: int) -> None:
    counts = [0] * len(weights)
    for coming, choice in enumerate(_run(Mixture(weights, lane), len(weights), 80), start=1):
        counts[choice] += 1
        assert all(abs(c - Fraction(w * coming, sum(weights))) < 2 for w, c in zip(weights, counts, strict=True))


def test_a_data_set_of_weight_0_is_never_drawn() -> None:
    assert set(_run(Mixture([2.0, 0.0, 1.0], lane=5), 3, 100)) == {0, 2}


def test_a_schedule_joins_the_changes_of_all_data_sets() -> None:
    schedule = Schedule.from_changes([[(0, 1.0)], [(5, 2.0), (9, 0.0)], [(0, 3.0), (9, 3.0)]])
    assert schedule.starts == (0, 5, 9)
    assert schedule.weights == ((1.0, 0.0, 3.0), (1.0, 2.0, 3.0), (1.0, 0.0, 3.0))
    assert [schedule.phase(step) for step in (0, 4, 5, 8, 9, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert Schedule.from_changes([[(0, 1.0), (7, 1.0)]]).starts == (0,), "a change to the same weights begins no phase"


def test_the_choice_depends_on_the_draws_alone() -> None:
    long = _run(Mixture([0.7, 0.2, 0.1], lane=3), 3, 50)
    draws = [long[:20].count(i) for i in range(3)]
    assert Mixture([0.7, 0.2, 0.1], lane=3).choose(draws) == long[20]


def test_lanes_do_not_draw_the_rare_data_set_at_once() -> None:
    first = [_run(Mixture([0.75, 0.25], lane), 2, 1)[0] for lane in range(8)]
    assert first.count(1) == 2


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, 1e-10], [float("nan")], [float("inf")]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataConfigError):
        Mixture(weights)
