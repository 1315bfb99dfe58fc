"""The simulated clock against closed forms, and against a loop that walks one second at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmscale.plan.checkpoints import LLAMA_3
from mmscale.rehearse.failures import (
    Hazards,
    daly_interval,
    expected_failures,
    expected_goodput,
    interval_table,
    simulate,
    spaced_intervals,
    young_interval,
)


@pytest.mark.parametrize(
    ("mtbf", "blocked", "restart", "interval"),
    [(20_000, 60, 600, 1_500), (5_000, 300, 900, 1_700), (3_000, 5, 60, 100), (2_000, 200, 1_500, 4_000)],
)
def test_failures_alone_agree_with_dalys_expected_time(
    mtbf: float, blocked: float, restart: float, interval: float
) -> None:
    hazards = Hazards(mtbf=mtbf, blocked=blocked, restart=restart)
    values = [simulate(hazards, interval, seed) for seed in range(10)]
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    assert error < 0.002
    assert np.mean(values) == pytest.approx(expected_goodput(hazards, interval), abs=4 * error)


def walk(hazards: Hazards, interval: int, seed: int, ends: int) -> float:
    """Walk a job second by second: restart, steps, saves, a writer beside the steps, preemptions with notice."""
    generator = np.random.default_rng(seed)
    kept = total = 0
    for _ in range(ends):
        life = round(generator.exponential(1 / hazards.rate))
        is_preempted = generator.random() < 1 / hazards.preemption_interval / hazards.rate
        steps = saved = blocked_left = done = 0
        writes: list[tuple[int, int]] = []  # (second at which it is complete, steps that it holds)
        for second in range(life):
            if second < hazards.restart:
                continue
            if blocked_left:
                blocked_left -= 1
                if not blocked_left:
                    writes.append((second + 1 + round(hazards.written), steps))
            else:
                steps, done = steps + 1, done + 1
                if done == interval:
                    done, blocked_left = 0, round(hazards.blocked)
            while writes and writes[0][0] <= second + 1:
                saved = writes.pop(0)[1]
        cost = round(hazards.blocked + hazards.written)
        if is_preempted and hazards.grace >= cost and life > hazards.restart:
            saved, life = steps, life + cost
        kept, total = kept + saved, total + life
    return kept / total


@pytest.mark.parametrize("grace", [0, 100])
def test_background_saves_and_preemptions_agree_with_a_walk_by_seconds(grace: float) -> None:
    hazards = Hazards(mtbf=900, preemption_interval=1_500, grace=grace, restart=60, blocked=5, written=40)
    walked = np.mean([walk(hazards, 120, seed, 300) for seed in range(4)])
    assert simulate(hazards, 120, 0) == pytest.approx(walked, abs=0.02)
    # The grace is worth 0.035.
    others = {name: getattr(hazards, name) for name in hazards.__dataclass_fields__ if name != "grace"}
    assert simulate(Hazards(grace=100, **others), 120, 0) > simulate(Hazards(grace=0, **others), 120, 0) + 0.02


@pytest.mark.parametrize(("mtbf", "blocked"), [(22_800, 60), (3_600, 300), (86_400, 1)])
def test_dalys_optimum_is_where_the_expected_time_is_shortest(mtbf: float, blocked: float) -> None:
    hazards = Hazards(mtbf=mtbf, blocked=blocked)
    intervals = np.geomspace(daly_interval(hazards) / 4, daly_interval(hazards) * 4, 4_000)
    best = max(intervals, key=lambda interval: expected_goodput(hazards, interval))
    assert daly_interval(hazards) == pytest.approx(best, rel=0.01)
    assert abs(young_interval(hazards) - best) > abs(daly_interval(hazards) - best)


def test_without_failures_only_saves_cost_time() -> None:
    hazards = Hazards(mtbf=math.inf, blocked=25)
    assert simulate(hazards, 75, 0) == expected_goodput(hazards, 75) == 0.75


def test_a_save_waits_for_the_one_before_it() -> None:
    hazards = Hazards(mtbf=math.inf, blocked=5, written=100)
    assert simulate(hazards, 95, 0) == 95 / (95 + 5 + 5)
    assert simulate(hazards, 200, 0) == 200 / 205


def test_the_llama_3_preset_has_the_published_counts() -> None:
    assert sum(LLAMA_3.causes.values()) == LLAMA_3.failures == 419
    assert 1000 * LLAMA_3.per_node_day == pytest.approx(3.79, abs=0.01)
    # 50,700 GPU-hours per failure.
    assert pytest.approx(8 * 24 / LLAMA_3.per_node_day) == 16_384 * 54 * 24 / 419
    half = expected_failures(LLAMA_3, LLAMA_3.nodes, 27)
    assert half["GPU"] == pytest.approx(74)


def test_the_table_repeats_and_has_the_configured_interval() -> None:
    steps = spaced_intervals(100, 37)
    assert 37 in steps
    assert 100 in steps
    assert min(steps) == 6
    assert max(steps) == 1600
    hazards = Hazards(mtbf=10_000)
    assert interval_table(hazards, 2.0, steps, 5) == interval_table(hazards, 2.0, steps, 5)
    assert interval_table(hazards, 2.0, [50], 5) != interval_table(hazards, 2.0, [50], 6)
