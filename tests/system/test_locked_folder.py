"""Two simultaneous starts of one run folder: one trains, the other names it, and no file has lines of both."""

from __future__ import annotations

import signal
import time

import pytest

from tests.system.conftest import MakeRun, kill_group


@pytest.mark.resume
@pytest.mark.slow
def test_of_two_starts_at_once_one_trains_and_its_files_stay_whole(make_run: MakeRun) -> None:
    run = make_run("shared", 1, "checkpoint.every_steps=1000")
    both = [run.start() for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in both):
            assert time.monotonic() < deadline, "both train"
            time.sleep(0.05)
        loser, winner = sorted(both, key=lambda process: process.poll() is None)
        text, _ = loser.communicate()
        assert loser.returncode == 1, text
        assert f"in use by process {winner.pid} on" in text
        assert "Traceback" not in text
        run.wait_for_step(winner, 3)
        before = run.metrics()
        third = make_run("shared", 2, "checkpoint.every_steps=1000", "seed=9")
        text = third.finish(code=1)
        assert f"in use by process {winner.pid} on" in text
        assert not (run.folder / "logs/torchrun.log").exists(), "the second launch wrote into the first one's logs"
        assert run.metrics()[: len(before)] == before
        winner.send_signal(signal.SIGTERM)
        text, _ = winner.communicate(timeout=60)
        assert winner.returncode == 75, text
    finally:
        for process in both:
            kill_group(process)
    steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    assert "seed: 1\n" in (run.folder / "config.yaml").read_text()
