"""Checkpoint intervals and goodput against a simulation of failures, and against published numbers."""

from __future__ import annotations

import random

import pytest

from mmscale.plan.checkpoints import Failures, best_interval, expected_goodput


def simulate(interval: float, save: float, mean: float, restart: float, intervals: int) -> float:
    """Run intervals one after the other; draw the time to the next failure anew after each event."""
    draw = random.Random(1)
    wall = 0.0
    for _ in range(intervals):
        while (failure := draw.expovariate(1 / mean)) < interval + save:
            wall += failure
            while (again := draw.expovariate(1 / mean)) < restart:
                wall += again
            wall += restart
        wall += interval + save
    return interval * intervals / wall


@pytest.mark.parametrize(
    ("interval", "save", "mean", "restart"), [(600, 30, 3600, 300), (60, 5, 200, 40), (900, 1, 1e5, 0)]
)
def test_goodput_is_that_of_a_simulation(interval: float, save: float, mean: float, restart: float) -> None:
    found = expected_goodput(interval, save, mean, restart)
    assert found == pytest.approx(simulate(interval, save, mean, restart, 4000), rel=0.05)


def test_the_best_interval_is_near_the_optimum_of_the_goodput() -> None:
    save, mean, restart = 20.0, 7200.0, 600.0
    grid = range(60, 3600, 20)
    best = max(grid, key=lambda each: expected_goodput(each, save, mean, restart))
    chosen = best_interval(save, mean)
    assert chosen == pytest.approx(best, rel=0.1)
    reached = expected_goodput(chosen, save, mean, restart)
    assert reached > 0.999 * expected_goodput(best, save, mean, restart)


def test_failures_of_llama_3() -> None:
    """arXiv 2407.21783, section 3.3.4: 419 interruptions in 54 days on 16,384 GPUs: one in about three hours."""
    assert Failures().mean_seconds(16_384) / 3600 == pytest.approx(54 * 24 / 419)
    assert Failures().gpu_hours == pytest.approx(50_700, rel=0.01)


def test_a_job_that_fails_faster_than_it_saves_never_ends() -> None:
    assert expected_goodput(1e6, 1e6, 1.0, 600) == 0.0
