"""A rank of a launched run is stopped (SIGSTOP): the launcher ends with the watchdog's exit code and message."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

from tests.system.conftest import MakeRun, child_processes, kill_group


@pytest.mark.fault
@pytest.mark.dist
def test_a_stopped_rank_ends_the_run(fork_run: MakeRun) -> None:
    rank = 0  # Rank 0 prints on the terminal, and may serve torch's store.
    limits = "engine.watchdog={step_seconds: 4, other_seconds: 100}"
    run = fork_run("run", 2, "max_steps=100000", "checkpoint.every_steps=1000", limits)
    process = run.start()
    try:
        run.wait_for_step(process, 3)
        os.kill(child_processes(process.pid)[rank], signal.SIGSTOP)
        stopped = time.monotonic()
        output, _ = process.communicate(timeout=120)
    finally:
        kill_group(process)
    assert time.monotonic() - stopped < 60, "before gloo's own limit (engine.timeout_seconds)"
    assert process.returncode == 76, output
    other = 1 - rank
    assert f"rank {other}: rank {rank} does not run any more" in output
    assert f"while rank {other} waits for it in all_" in output or "waits for it in reduce_scatter" in output
    assert (run.folder / "logs" / f"hang-rank-{other}.txt").stat().st_size
    assert "Traceback" not in output
    verdict = json.loads((run.folder / "heartbeats/verdict.json").read_text())
    assert (verdict["rank"], verdict["silent_nodes"]) == (other, [socket.gethostname()])
