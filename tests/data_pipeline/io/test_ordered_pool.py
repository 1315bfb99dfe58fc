"""The ordered pool: order of results, errors, and processes that die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.errors import DataConfigError, SampleError, WorkerError
from data_pipeline.io.ordered_pool import in_order


@dataclass(frozen=True)
class Work:
    """Yields results (task, 0), (task, 1), ..., after a random delay; task 7 may fail."""

    at_seven: str = ""

    def __call__(self, task: int) -> Iterator[tuple[int, int, bytes]]:
        time.sleep(random.Random(task).random() * 0.002)
        if task == 7 and self.at_seven == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == 7 and self.at_seven == "refuse":
            raise SampleError("seven", shard="s", key="k")
        if task == 7 and self.at_seven == "bug":
            raise KeyError("a defect")
        if task == 7 and self.at_seven == "memory":
            bytearray(1 << 60)
        for number in range(task % 4):
            yield task, number, bytes([task % 256]) * (1 << 20)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_tasks(workers: int) -> None:
    # The results exceed the capacity of a pipe, so a process must work while others are read.
    expected = [(task, number) for task in range(40) for number in range(task % 4)]
    assert [(task, number) for task, number, _ in in_order(Work(), range(40), workers)] == expected


def _variable(name: str) -> Iterator[str]:
    yield os.environ.get(name, "none")


def test_processes_have_the_variables_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they come from a server that started with others."""
    name = "MMSCALE_TEST_VARIABLE"
    monkeypatch.setenv(name, "first")
    assert list(in_order(_variable, [name], 1)) == ["first"]
    monkeypatch.delenv(name)
    assert list(in_order(_variable, [name], 1)) == ["none"]


@pytest.mark.fault
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_work_is_raised_at_its_position(workers: int) -> None:
    results = in_order(Work("refuse"), range(40), workers)
    assert [next(results)[0] for _ in range(9)] == [1, 2, 2, 3, 3, 3, 5, 6, 6]
    with pytest.raises(SampleError, match="s/k: seven"):
        next(results)


@pytest.mark.fault
def test_a_dead_or_defective_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"without an error message \(signal 9 \(SIGKILL\)\)"):
        list(in_order(Work("die"), range(40), 2))
    with pytest.raises(WorkerError, match="KeyError: 'a defect'"):
        list(in_order(Work("bug"), range(40), 2))
    with pytest.raises(WorkerError, match="out of memory \\(MemoryError\\): use fewer processes"):
        list(in_order(Work("memory"), range(40), 2))
    with pytest.raises(DataConfigError, match="workers=-1"):
        list(in_order(Work(), range(3), -1))


_CALLER = """
import multiprocessing, os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_ordered_pool import Work
from data_pipeline.io.ordered_pool import in_order
results = in_order(Work(), range(10**9), 2)
next(results)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault
def test_no_process_outlives_a_killed_caller() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CALLER, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        # A dead child of a dead parent stays a zombie if process 1 does not reap it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
