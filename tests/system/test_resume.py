"""A run that is killed at any step goes on by itself and ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
import time
from typing import Any

import pytest

from tests.system.conftest import MakeRun, Run, kill_group

STEPS = 24
WORDS = (f"max_steps={STEPS}", "model.decoder.dropout=0.1")


def curve(run: Run) -> list[tuple[Any, ...]]:
    """What must not change: everything but time and memory."""
    return [
        (line["step"], line["loss"], line["grad_norm"], line["lr"], line["tokens"], line["samples"])
        for line in run.metrics()
    ]


@pytest.mark.resume
@pytest.mark.dist
def test_killed_run_continues_bit_for_bit(make_run: MakeRun) -> None:
    undisturbed = make_run("undisturbed", 2, *WORDS)
    undisturbed.finish()
    expected = curve(undisturbed)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    for kill_at in random.Random(0).sample(range(2, STEPS - 1), 3):
        run = make_run("killed", 2, *WORDS)
        process = run.start()
        run.wait_for_step(process, kill_at)
        kill_group(process)
        output = run.finish()
        assert curve(run) == expected, f"killed at {kill_at}: {output}"
        if kill_at > 6:
            assert "going on from" in output
        shutil.rmtree(run.folder)


@pytest.mark.resume
def test_a_signal_saves_and_the_next_start_goes_on(make_run: MakeRun) -> None:
    undisturbed = make_run("undisturbed", 1, f"max_steps={STEPS}", "checkpoint.every_steps=1000")
    undisturbed.finish()
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        run = make_run(f"stopped-{stop.name}", 1, f"max_steps={STEPS}", "checkpoint.every_steps=1000")
        process = run.start()
        run.wait_for_step(process, 3)
        process.send_signal(stop)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        stopped_at = run.metrics()[-1]["step"]
        assert stopped_at < STEPS, "the run was over before the signal came"
        assert (run.folder / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
        run.finish()
        assert curve(run) == curve(undisturbed)


@pytest.mark.resume
def test_a_signal_during_set_up_stops_after_the_first_step(make_run: MakeRun) -> None:
    run = make_run("early", 1, f"max_steps={STEPS}")
    process = run.start()
    while not (run.folder / "config.yaml").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert [line["step"] for line in run.metrics()] == [1]


@pytest.mark.resume
@pytest.mark.dist
def test_goes_on_with_another_number_of_ranks(make_run: MakeRun) -> None:
    whole = make_run("whole", 2, *WORDS)
    whole.finish()
    make_run("moved", 2, *WORDS, "max_steps=10").finish()
    moved = make_run("moved", 1, *WORDS, "engine.micro_lanes=2")
    moved.finish()
    for mine, theirs in zip(curve(moved), curve(whole), strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
        assert mine[4:] == theirs[4:]
