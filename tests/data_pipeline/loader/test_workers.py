"""Worker processes that make items ahead: their items, how they stop, and how they fail."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from multiprocessing import Value
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import WorkerError
from data_pipeline.loader.workers import Workers


def squares(worker: int) -> Generator[tuple[int, int], None, None]:
    for number in itertools.count():
        yield worker, number**2


def tensors(worker: int) -> Generator[Any, None, None]:
    """Yield tensors in unnamed shared memory, which only the worker itself can send."""
    for number in range(3):
        yield torch.full((1000,), number).share_memory_()
    yield "the end"


def large(_: int) -> Generator[bytes, None, None]:
    """Yield an item that is much larger than the buffer of a pipe."""
    while True:
        yield bytes(1 << 20)


def too_large(_: int) -> Generator[int, None, None]:
    yield 1
    torch.empty(1 << 50, dtype=torch.uint8)


def failing(_: int) -> Generator[int, None, None]:
    yield 1
    raise KeyError("nobody thought of this")


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.long
def test_items_come_in_order_from_each_worker(clean: bool) -> None:
    workers = Workers(squares, 3, 2, clean=clean, preload=(__name__,))
    taken = [[workers.next_item(worker) for _ in range(20)] for worker in (2, 0, 1)]
    assert taken == [[(worker, number**2) for number in range(20)] for worker in (2, 0, 1)]
    processes = workers.processes
    assert len(processes) == 3
    workers.close()
    assert not any(process.is_alive() for process in processes)
    workers.close()


def variable(_: int) -> Generator[str, None, None]:
    yield os.environ.get("MMSCALE_TEST_VARIABLE", "none")


def test_workers_have_the_variables_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they come from a server that started with others."""
    monkeypatch.setenv("MMSCALE_TEST_VARIABLE", "first")
    first = Workers(variable, 1, 1, clean=True)
    assert first.next_item(0) == "first"
    first.close()
    monkeypatch.delenv("MMSCALE_TEST_VARIABLE")
    second = Workers(variable, 1, 1, clean=True)
    assert second.next_item(0) == "none"
    second.close()


@pytest.mark.parametrize("ahead", [1, 4])
def test_a_worker_makes_so_many_ahead_and_no_more(ahead: int) -> None:
    made = Value("i", 0)

    def count(_: int) -> Generator[int, None, None]:
        while True:
            made.value += 1
            yield made.value

    workers = Workers(count, 1, ahead, clean=False)
    for taken in (0, 1, 2):
        deadline = time.monotonic() + 20
        while made.value < taken + ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # Enough time to make another item.
        assert made.value == taken + ahead
        assert workers.next_item(0) == taken + 1
    workers.close()


def test_what_a_worker_shares_can_be_taken_after_its_last_item_was_made() -> None:
    workers = Workers(tensors, 1, 8, clean=False)
    time.sleep(0.5)  # The worker has made its last item.
    assert [workers.next_item(0).tolist() for _ in range(3)] == [[number] * 1000 for number in range(3)]
    assert workers.next_item(0) == "the end"
    assert workers.processes[0].is_alive()
    workers.close()


def test_a_worker_that_waits_for_a_reader_of_its_item_is_stopped() -> None:
    workers = Workers(large, 2, 3, clean=False)
    assert len(workers.next_item(1)) == 1 << 20
    processes, start = workers.processes, time.monotonic()
    workers.close()
    assert time.monotonic() - start < 4, "it was killed when patience ended"
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_worker_out_of_memory_says_so_without_a_traceback() -> None:
    workers = Workers(too_large, 1, 2, clean=False)
    assert workers.next_item(0) == 1
    with pytest.raises(
        WorkerError, match=r"loader worker 0 failed:\nout of memory \(.*: use fewer data.workers"
    ) as caught:
        workers.next_item(0)
    assert "Traceback" not in str(caught.value)
    workers.close()


def test_a_fault_that_nobody_foresaw_is_shown_where_it_happened() -> None:
    workers = Workers(failing, 1, 2, clean=False)
    assert workers.next_item(0) == 1
    with pytest.raises(WorkerError, match=r"loader worker 0 failed:(.|\n)*in failing(.|\n)*nobody thought of this"):
        workers.next_item(0)
    workers.close()


@pytest.mark.fault
def test_a_worker_that_is_killed_is_named() -> None:
    workers = Workers(squares, 2, 1, clean=False)
    assert workers.next_item(0) == (0, 0)
    victim = workers.processes[1]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)

    def take_what_it_had_sent() -> None:
        for _ in range(4):
            workers.next_item(1)

    with pytest.raises(WorkerError, match=r"loader worker 1 exited without an error message \(signal 9 \(SIGKILL\)\)"):
        take_what_it_had_sent()
    assert workers.next_item(0) == (0, 1)
    workers.close()


def test_a_fork_of_the_consumer_stops_nobody() -> None:
    workers = Workers(squares, 1, 1, clean=False)
    child = os.fork()
    if child == 0:
        workers.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [workers.next_item(0)[1] for _ in range(3)] == [0, 1, 4]
    workers.close()


@pytest.mark.fault
def test_a_full_shm_at_the_start_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    made, semaphore = [], BaseContext.Semaphore

    def full(self: BaseContext, value: int = 1) -> Any:
        made.append(value)
        if len(made) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return semaphore(self, value)

    monkeypatch.setattr(BaseContext, "Semaphore", full)
    with pytest.raises(WorkerError, match=r"2 of 4 loader workers started.*No space left.*--shm-size.*data\.workers"):
        Workers(squares, 4, 1, clean=False)


_MODULE = """
class Work:
    def __call__(self, task):
        yield task * 10

def items(worker):
    yield worker
"""
_SCRIPT = """
print("the script runs", flush=True)
import things
from data_pipeline.io.ordered_pool import in_order
from data_pipeline.loader.workers import Workers

workers = Workers(things.items, 2, 1, clean=True)
print(workers.next_item(0), workers.next_item(1), *in_order(things.Work(), [1, 2, 3], 2))
workers.close()
"""


@pytest.mark.long
def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    (tmp_path / "things.py").write_text(_MODULE)
    (tmp_path / "script.py").write_text(_SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the script runs\n0 1 10 20 30\n", "")


_ORPHANS = """
import sys
from data_pipeline.loader.workers import Workers
from tests.data_pipeline.loader.test_workers import squares

if __name__ == "__main__":
    workers = Workers(squares, 2, 2, clean=sys.argv[1] == "clean")
    workers.next_item(1)
    print(*(process.pid for process in workers.processes), flush=True)
    sys.stdin.read()
"""


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.fault
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("start", ["clean", "plain"])
def test_workers_end_with_the_process_that_loads(start: str) -> None:
    """Workers of a fork server are no children of the consumer, so the system does not stop them with it."""
    command = [sys.executable, "-c", _ORPHANS, start]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(is_alive, workers))
        process.kill()
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.05)


_ARENAS = """
import ctypes, sys, threading
from data_pipeline.loader import workers

if sys.argv[1] == "worker":
    workers._set_up_process({})
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
everybody = threading.Barrier(9)

def allocate():
    everybody.wait()
    libc.malloc(1000)
    everybody.wait()

for _ in range(8):
    threading.Thread(target=allocate).start()
everybody.wait()
everybody.wait()
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="arenas are glibc's")
@pytest.mark.long
def test_threads_of_a_worker_share_two_arenas(tmp_path: Path) -> None:
    """Without the limit there are up to eight arenas per core, each with the memory of its peak."""

    def arenas(process: str) -> int:
        path = tmp_path / process
        subprocess.run([sys.executable, "-c", _ARENAS, process, str(path)], check=True)
        return path.read_text().count("<heap nr=")

    assert arenas("worker") <= 2 < arenas("other")
