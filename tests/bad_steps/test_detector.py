"""The threshold against numpy, its robustness, and an exact resume of its state."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mmscale.bad_steps.detector import BadStepsConfig, SpikeDetector, threshold

CONFIG = BadStepsConfig(loss_deviations=6, norm_deviations=6, window_steps=16, min_steps=8)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(0.1, 20))
def test_threshold_equals_the_formula(values: list[float], deviations: float) -> None:
    logs = np.log(values)
    spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    assert threshold(values, deviations) == pytest.approx(
        np.exp(np.median(logs) + deviations * max(spread, 0.05)), rel=1e-9
    )


def test_a_normal_spread_is_counted_in_its_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(1.0, 0.3, 20_000))
    assert math.log(threshold(values.tolist(), 5)) == pytest.approx(1.0 + 5 * 0.3, rel=0.03)


def test_spikes_in_the_window_do_not_hide_the_next() -> None:
    detector = SpikeDetector(CONFIG)
    for number in range(16):
        detector.record(2.0 + 0.01 * number, 1.0, True)
    for number in range(7):
        assert detector.reason(50.0, 1.0) is not None, number
        assert "loss of 50 is a spike" in str(detector.record(50.0, 1.0, False))
    assert detector.in_row == detector.num_bad == 7
    assert detector.record(2.1, 1.0, True) is None
    assert detector.in_row == 0


def test_a_level_that_has_moved_for_good_becomes_the_measure() -> None:
    detector = SpikeDetector(CONFIG)
    for _ in range(16):
        detector.record(1.0, 1.0, True)
    reasons = [detector.record(4.0, 1.0, detector.reason(4.0, 1.0) is None) for _ in range(12)]
    assert reasons[0] is not None
    assert reasons[-1] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_and_without_limits(value: float) -> None:
    detector = SpikeDetector(BadStepsConfig())
    assert detector.reason(value, 1.0) == "the loss is not finite"
    assert detector.reason(1.0, value) == "the gradient norm is not finite"
    assert detector.reason(1e30, 1e30) is None


def test_nothing_is_a_spike_before_the_window_has_some_steps_and_a_stage_begins_anew() -> None:
    detector = SpikeDetector(CONFIG)
    for _ in range(7):
        detector.record(1.0, 1.0, True)
    assert detector.reason(100.0, 1.0) is None
    detector.record(1.0, 1.0, True)
    assert detector.reason(100.0, 1.0) is not None
    detector.begin_stage()
    assert detector.reason(100.0, 1.0) is None


def test_a_state_that_went_through_json_judges_alike() -> None:
    draws = random.Random(3)
    whole, parts = SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    for _ in range(300):
        loss, norm = draws.lognormvariate(0, 0.5), draws.lognormvariate(0, 0.5) * (30 if draws.random() < 0.1 else 1)
        assert whole.record(loss, norm, True) == parts.record(loss, norm, True)
        parts = SpikeDetector(CONFIG, json.loads(json.dumps(parts.state())))
        assert parts.in_row == whole.in_row
    assert whole.num_bad == parts.num_bad > 10


def test_a_value_of_0_or_one_that_is_not_finite_leaves_the_window_alone() -> None:
    detector, plain = SpikeDetector(CONFIG), SpikeDetector(CONFIG)
    for number in range(20):
        for each in (detector, plain):
            assert each.record(1.0 + 0.01 * number, 2.0, True) is None
        assert detector.record(0.0, 0.0, True) is None, "a loss of 0 is no spike, and has no logarithm"
        bad = detector.record(0.0, math.inf, False)
        assert bad is not None
        assert bad.reason == "the gradient norm is not finite"
        assert detector.thresholds() == plain.thresholds()
    assert detector.reason(50.0, 2.0) is not None
    assert detector.reason(1.0, 50.0) is not None


VALUES = st.sampled_from([1.0, 1.0, 1.01, 1.1, 1.3, 2.0, 9.0, 0.0, math.inf, math.nan])
LIMITS = st.sampled_from([None, 2.0, 6.0])


@settings(max_examples=60)
@given(st.lists(st.tuples(VALUES, VALUES, st.booleans()), min_size=8, max_size=40), LIMITS, LIMITS)
def test_every_step_is_judged_by_the_window_before_it(
    steps: list[tuple[float, float, bool]], loss_limit: float | None, norm_limit: float | None
) -> None:
    config = BadStepsConfig(loss_deviations=loss_limit, norm_deviations=norm_limit, window_steps=9, min_steps=4)
    detector = SpikeDetector(config)
    windows: tuple[list[float], list[float]] = ([], [])
    bad: list[bool] = []
    for loss, norm, applied in steps:
        limits = [
            threshold(values[-9:], limit) if limit and len(values[-9:]) >= 4 else math.inf
            for values, limit in zip(windows, (loss_limit, norm_limit), strict=True)
        ]
        words = "another rank" if not applied else None
        for name, value, limit in (("gradient norm", norm, limits[1]), ("loss", loss, limits[0])):
            words = f"the {name} of {value:.4g} is a spike: above {limit:.4g}" if value > limit else words
        for name, value in (("gradient norm", norm), ("loss", loss)):
            words = words if math.isfinite(value) else f"the {name} is not finite"
        refused = detector.reason(loss, norm) is not None
        assert refused == (words is not None and not words.startswith("another"))
        step = detector.record(loss, norm, applied)
        reason = None if step is None else step.reason
        assert reason == words or (words == "another rank" and str(reason).startswith(words))
        bad.append(reason is not None)
        assert detector.num_bad == sum(bad)
        assert detector.in_row == len(bad) - max((i + 1 for i, each in enumerate(bad) if not each), default=0)
        for values, value in zip(windows, (loss, norm), strict=True):
            values.extend([value] if 0 < value < math.inf else [])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_steps=40"):
        BadStepsConfig(window_steps=32, min_steps=40)
    assert BadStepsConfig(window_steps=32, min_steps=32).min_steps == 32


def test_the_threshold_itself_is_no_spike() -> None:
    detector = SpikeDetector(CONFIG)
    for number in range(8):
        detector.record(1.0 + 0.1 * number, 2.0 + 0.1 * number, True)
    loss, norm = detector.thresholds()["loss"], detector.thresholds()["grad_norm"]
    assert loss is not None
    assert norm is not None
    assert detector.reason(loss, norm) is None
    assert str(detector.reason(math.nextafter(loss, math.inf), norm)).startswith("the loss")
    assert str(detector.reason(loss, math.nextafter(norm, math.inf))).startswith("the gradient norm")
