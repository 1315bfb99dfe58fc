"""Whole runs through the command line, as a user starts them.

``make_run`` starts an interpreter for each process. ``fork_run`` forks the command and its ranks from a process that
has imported all modules, which halves the time of a short run. Use ``fork_run`` unless a test depends on how processes
start or what other processes see of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fork_server import SLOW_FROM, Child, fork_server

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "tests/system/tiny.yaml"
DEEP = ("model.decoder.num_layers=8", "model.connector.every=4")
"""Changes for tests whose curve must have a spike or a turn: those of the shallow model of ``TINY`` fall evenly."""
_STARTS = itertools.count()
Process = subprocess.Popen[str] | Child


@dataclass
class Run:
    """A run folder and the command of its run."""

    folder: Path
    words: list[str]
    forked: bool = False

    def start(self, *, slow_from: int | None = None) -> Process:
        """Start the command in a new process group.

        Args:
            slow_from: From this step on, the run waits a second after each step: a busy machine, too, can stop it
                before its last step. For forked runs.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.forked:
            environment |= {} if slow_from is None else {SLOW_FROM: str(slow_from)}
            number = next(_STARTS)
            log = self.folder.with_name(f"{self.folder.name}-start-{number}.log")
            call = "tests.engine.fork_server:run_command"
            return fork_server(number % 2).fork(call, [self.words], environment, log)
        return subprocess.Popen(
            [sys.executable, "-m", "mmscale.cli.main", *self.words],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *, code: int = 0, timeout: float = 240) -> str:
        """Run to the end and return the output."""
        process = self.start()
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            kill_group(process)
        assert process.returncode == code, output
        return output

    def metrics(self) -> list[dict[str, Any]]:
        """Return the complete lines of ``metrics.jsonl``."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for_step(self, process: Process, step: int, timeout: float = 120) -> None:
        """Wait until ``metrics.jsonl`` has ``step``."""
        deadline = time.monotonic() + timeout
        while not any(line["step"] >= step for line in self.metrics()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"no step {step} after {timeout} s"
            time.sleep(0.01)


def kill_group(process: Process) -> None:
    """Send SIGKILL to the whole process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child_processes(pid: int) -> list[int]:
    """Return the children of a process, in the order of their start. Those of a launcher are its ranks."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


MakeRun = Callable[..., Run]


def run_in(parent: Path, name: str, ranks: int, *overrides: str, config: Path = TINY) -> Run:
    """Return a run in the folder ``parent/name``."""
    folder = parent / name
    start = ["train", str(config)] if ranks == 1 else ["launch", "local", str(config), "--ranks", str(ranks)]
    return Run(folder, [*start, f"run_dir={folder}", *overrides])


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, ranks, *overrides)``."""
    return functools.partial(run_in, tmp_path)


@pytest.fixture
def fork_run(make_run: MakeRun) -> MakeRun:
    """Like ``make_run``, but forks the processes."""
    return lambda *words, **config: replace(make_run(*words, **config), forked=True)
