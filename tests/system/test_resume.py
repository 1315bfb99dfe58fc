"""A run that is killed at any step resumes, with the same result as an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.system.conftest import MakeRun, Run, kill_group, run_in

STEPS = 16
EVERY = 5
"""Steps from checkpoint to checkpoint, as tiny.yaml says."""
WORDS = (f"max_steps={STEPS}", "model.decoder.dropout=0.1")


def curve(run: Run) -> list[tuple[Any, ...]]:
    """Return the values that must be equal: all but time and memory."""
    return [
        (line["step"], line["loss"], line["grad_norm"], line["lr"], line["tokens"], line["samples"])
        for line in run.metrics()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Return the curve of an undisturbed run on two ranks."""
    run = replace(run_in(tmp_path_factory.mktemp("whole"), "whole", 2, *WORDS), forked=True)
    run.finish()
    return curve(run)


@pytest.mark.resume
@pytest.mark.dist
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_continues_bit_for_bit(
    fork_run: MakeRun, whole: list[tuple[Any, ...]]
) -> None:
    assert [row[0] for row in whole] == list(range(1, STEPS + 1))
    run = fork_run("killed", 2, *WORDS)
    kills = sorted(random.Random(0).sample(range(2, STEPS - 3), 3))
    assert kills[0] < EVERY < kills[1] < 2 * EVERY < kills[2], "before a checkpoint, behind the first, behind another"
    for kill_at in kills:
        process = run.start(slow_from=STEPS - 2)
        run.wait_for_step(process, kill_at)
        kill_group(process)
        assert run.metrics()[-1]["step"] < STEPS, "the run was over before it was killed"
    output = run.finish()
    assert "resuming from" in output
    assert curve(run) == whole, f"killed at {kills}: {output}"


@pytest.mark.resume
def test_a_signal_saves_and_the_next_start_goes_on(fork_run: MakeRun) -> None:
    words = (f"max_steps={STEPS}", "checkpoint.every_steps=1000")
    undisturbed = fork_run("undisturbed", 1, *words)
    undisturbed.finish()
    run = fork_run("stopped", 1, *words)
    stopped_at = 0
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process = run.start(slow_from=STEPS - 2)
        run.wait_for_step(process, stopped_at + 2)
        process.send_signal(stop)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        stopped_at = run.metrics()[-1]["step"]
        assert stopped_at < STEPS, "the run was over before the signal came"
        assert (run.folder / "checkpoints" / f"step-{stopped_at:08d}").is_dir()
    run.finish()
    assert curve(run) == curve(undisturbed)


@pytest.mark.resume
def test_a_signal_during_set_up_stops_after_the_first_step(fork_run: MakeRun) -> None:
    run = fork_run("early", 1, f"max_steps={STEPS}")
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
def test_goes_on_with_another_number_of_ranks(fork_run: MakeRun, whole: list[tuple[Any, ...]]) -> None:
    fork_run("moved", 2, *WORDS, "max_steps=7").finish()
    moved = fork_run("moved", 1, *WORDS, "engine.micro_lanes=2")
    moved.finish()
    for mine, theirs in zip(curve(moved), whole, strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)
        assert mine[4:] == theirs[4:]
