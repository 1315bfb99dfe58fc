"""Run a comparison undisturbed, and again with a kill and a restart, in forks of one process that imports once.

``program.py FOLDER WORD...`` writes ``FOLDER/undisturbed`` and ``FOLDER/killed``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from mmscale.compare import plan_trials, read_comparison, run_trials, write_comparison
from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.run.train import Outcome, train

TINY = Path(__file__).with_name("tiny.yaml")


def fork(work: Callable[[], bool]) -> int:
    """Fork a child that exits with 0 if ``work`` returns true; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = 0 if work() else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(path: Path, run_dir: Path) -> int:
    """Train in a separate process, as the launcher does: DeepSpeed keeps state of the last run in a process."""
    child = fork(lambda: train(load(path, [], RunConfig)) is Outcome.FINISHED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def compare(folder: Path, words: list[str]) -> bool:
    """Run the whole comparison as leader of a process group."""
    os.setpgid(0, 0)
    comparison = read_comparison(TINY, [f"run_dir={folder}", *words])
    trials = plan_trials(comparison)
    failures = run_trials(comparison, trials, start, print, lambda failures: None)
    write_comparison(comparison, trials, failures)
    return not failures


def finish(child: int) -> None:
    """Wait for a child and assert that it succeeded."""
    assert os.waitpid(child, 0)[1] == 0


def kill_in_the_middle(child: int, run: Path, step: int) -> None:
    """Send SIGKILL to the group after ``run`` has finished ``step``."""
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= step):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the comparison ended before it could be killed"
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    finish(fork(lambda: compare(Path(folder) / "undisturbed", words)))
    killed = Path(folder) / "killed"
    kill_in_the_middle(fork(lambda: compare(killed, words)), killed / "cross" / "seed-1", step=5)
    assert not (killed / "cross" / "seed-1" / "result.json").exists()
    first = killed / "embedding" / "seed-1" / "result.json"
    before = first.stat().st_mtime_ns
    finish(fork(lambda: compare(killed, words)))
    assert first.stat().st_mtime_ns == before, "the finished run was trained again"
