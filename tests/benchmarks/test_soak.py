"""The evaluation of a soak: recorded deliveries, and a slope with its uncertainty."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.soak import Delivery, Slope, resident_bytes, slope
from benchmarks.soak_data import write_damaged_set
from data_pipeline.prepare.verify import jobs_of, verify
from data_pipeline.shards.damage import Problem

BAD = np.array([False, True, False])


def delivered(*events: tuple[int, int, bool]) -> Delivery:
    """Return the record after these (epoch, sample, whether it was skipped)."""
    delivery = Delivery(BAD)
    for epoch, sample, is_skipped in events:
        if is_skipped:
            delivery.skipped(epoch, sample, "decode")
        else:
            delivery.arrived(epoch, sample)
    return delivery


def test_an_epoch_is_complete_when_every_sample_arrived_or_was_left_out() -> None:
    delivery = delivered((0, 0, False), (0, 1, True), (1, 0, False))
    assert (delivery.missing(0), delivery.is_complete(0)) == (1, False)
    delivery.arrived(0, 2)
    assert (delivery.missing(0), delivery.is_complete(0), delivery.is_complete(1)) == (0, True, False)
    assert delivery.complaints == []


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([(0, 1, False)], "sample 1, which is damaged, was delivered in epoch 0"),
        ([(2, 0, True)], "sample 0, which is sound, was left out in epoch 2: decode"),
        ([(0, 0, False), (0, 0, False)], "sample 0 came a second time in epoch 0"),
        ([(0, 0, False), (0, 1, True), (0, 2, False), (0, 0, False)], "sample 0 came a second time in epoch 0"),
    ],
)
def test_whatever_else_happens_is_a_complaint(events: list[tuple[int, int, bool]], complaint: str) -> None:
    assert delivered(*events).complaints == [complaint]


def test_the_slope_is_that_of_numpy_and_its_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    seconds = np.arange(0.0, 400.0, 2.0)
    hits = 0
    for _ in range(400):
        values = 3.0 + 0.05 * seconds + rng.normal(0, 5, len(seconds))
        line = slope(seconds, values)
        assert line.value == pytest.approx(np.polyfit(seconds, values, 1)[0])
        hits += abs(line.value - 0.05) <= line.half_width
    assert 0.9 <= hits / 400 <= 0.99


def test_a_single_reading_has_no_slope() -> None:
    assert slope(np.array([12.0]), np.array([1193.0])) == Slope(0.0, 0.0)


def test_a_slope_of_a_random_walk_is_hardly_certain() -> None:
    rng = np.random.default_rng(1)
    seconds = np.arange(500.0)
    noise = slope(seconds, rng.normal(0, 1, 500))
    walk = slope(seconds, np.cumsum(rng.normal(0, 1, 500)))
    assert walk.half_width > 50 * noise.half_width


def test_resident_memory_counts_children() -> None:
    alone = resident_bytes(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        both, its = resident_bytes(os.getpid()), resident_bytes(child.pid)
        without = resident_bytes(os.getpid(), without=child.pid)
        child.communicate(b"\n")
    assert its > 2**20
    assert both - its == pytest.approx(alone, rel=0.2)
    assert without == pytest.approx(alone, rel=0.2)


def test_the_damaged_set_is_damaged_where_it_says(tmp_path: Path) -> None:
    damaged = write_damaged_set(tmp_path, 600, seed=3)
    found = [damage for report in verify(jobs_of(damaged.manifest)[1]) for damage in report.damages]
    keys = {int(damage.key) for damage in found}
    assert damaged.bad.sum() == 30
    assert keys <= set(np.flatnonzero(damaged.bad).tolist())
    assert len(keys) >= 30 - 2 * 3, "a caption too long for a pack is no damage of a shard"
    assert {Problem.IMAGE, Problem.BOMB, Problem.TEXT, Problem.CHECKSUM, Problem.EXTENSION} <= {
        d.problem for d in found
    }
