"""Worker processes that make items ahead of their consumer.

    worker w: item, item, ... --its pipe--> next_item(w)
                    ^--- semaphore ---------'

Each worker writes to its own pipe, from the thread that makes the items. A semaphore limits how far the worker is
ahead. There are no helper threads, and a worker that dies closes its pipe, so the consumer notices at once. Torch's
``DataLoader`` uses two queues and three threads, and takes 0.1 ms more per item. Not for: distributing single tasks
(``ordered_pool``).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from typing import Any, Generic, TypeVar, cast

import torch

from data_pipeline.errors import WorkerError, out_of_memory
from data_pipeline.io.processes import end_with, ending, replace_environment, without_script

T = TypeVar("T")

Make = Callable[[int], Generator[T, None, None]]
"""Returns the generator of a worker's items, given the worker's number; called in the worker's process."""

_JOIN_SECONDS = 5.0
_M_ARENA_MAX = -8
"""The constant of glibc's malloc.h."""


@dataclass(frozen=True)
class _Failed:
    """The item that a worker sends when its generator raised an exception."""

    report: str


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    room: Semaphore


class Workers(Generic[T]):
    """Running worker processes.

    Args:
        make: Makes the generator of a worker's items. After its last item a worker waits for ``close``, because the
            consumer may still use memory that the worker shares.
        count: Number of workers.
        ahead: Most items that a worker makes before the consumer receives them, at least 1.
        clean: Start the workers from a fork server instead of Python's default method: a fork of this process would
            lose its threads.
        preload: Modules to import once before the workers start, in the fork server or else in this process.

    Raises:
        WorkerError: a process could not be started.
    """

    def __init__(self, make: Make[T], count: int, ahead: int, *, clean: bool, preload: tuple[str, ...] = ()) -> None:
        context: BaseContext = multiprocessing.get_context("forkserver" if clean else None)
        if clean:
            context.set_forkserver_preload(list(preload))
        else:
            for module in preload:
                importlib.import_module(module)
        self._workers: list[_Worker] = []
        stopped = context.RawValue("b", 0)  # Without a lock: a killed worker could hold it for ever.
        self._stop = weakref.finalize(self, _stop, self._workers, stopped, os.getpid())
        # Workers ignore SIGTERM, so they must be stopped before multiprocessing terminates and joins them at exit.
        atexit.register(self._stop)
        try:
            for number in range(count):
                self._workers.append(_start(context, make, number, ahead, stopped))
        except OSError as error:
            started = len(self._workers)
            self.close()
            raise WorkerError(
                f"{started} of {count} loader workers started, the next one failed: {error.strerror or error}. Each "
                "needs 4 KiB of /dev/shm (docker run --shm-size=64m), three file handles and a process; raise the "
                "limit that was reached, or lower data.workers"
            ) from error

    @property
    def processes(self) -> list[BaseProcess]:
        """The processes of the running workers, by number."""
        return [worker.process for worker in self._workers]

    def next_item(self, number: int) -> T:
        """Return the next item of a worker; waits for it. Do not call it after the worker's last item.

        Raises:
            WorkerError: the worker died, or its generator raised an exception.
        """
        worker = self._workers[number]
        try:
            item = worker.pipe.recv()
        except (EOFError, OSError) as error:
            worker.process.join(_JOIN_SECONDS)
            raise WorkerError(
                f"loader worker {number} exited without an error message ({ending(worker.process)}): out of memory? "
                "Resume with fewer data.workers or a smaller data.prefetch"
            ) from error
        if isinstance(item, _Failed):
            raise WorkerError(f"loader worker {number} failed:\n{item.report}")
        worker.room.release()
        return cast(T, item)

    def close(self) -> None:
        """Stop the workers. Idempotent."""
        self._stop()
        atexit.unregister(self._stop)


def _start(context: BaseContext, make: Make[T], number: int, ahead: int, stopped: Any) -> _Worker:
    pipe, worker_end = context.Pipe(duplex=False)
    room = context.Semaphore(ahead)
    process = cast(Any, context).Process(
        target=_work,
        args=(make, number, worker_end, room, stopped, dict(os.environ)),
        name=f"loader-{number}",
        daemon=True,
    )
    with contextlib.nullcontext() if context.get_start_method() == "fork" else without_script():
        process.start()
    worker_end.close()  # Before the next fork, or the next worker would keep this pipe open after this worker's death.
    return _Worker(process, pipe, room)


def _stop(workers: list[_Worker], stopped: Any, owner: int) -> None:
    """Stop the workers; kill those that do not exit within ``_JOIN_SECONDS``, all together."""
    if os.getpid() != owner:  # A forked process has copies of the handles, but the workers are not its children.
        return
    stopped.value = 1
    for worker in workers:
        worker.room.release()
    deadline = time.monotonic() + _JOIN_SECONDS
    for worker in workers:
        _drain(worker, deadline)
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.pipe.close()
    workers.clear()


def _drain(worker: _Worker, deadline: float) -> None:
    """Discard the items that the worker still sends: a full pipe would block it."""
    with contextlib.suppress(EOFError, OSError):
        while (left := deadline - time.monotonic()) > 0:
            if worker.pipe not in wait([worker.pipe, worker.process.sentinel], left):
                return
            worker.pipe.recv_bytes()


def _work(
    make: Make[T], number: int, pipe: Connection, room: Semaphore, stopped: Any, environment: Mapping[str, str]
) -> None:
    """The main function of a worker process."""
    _set_up_process(environment)
    room.acquire()
    try:
        with contextlib.closing(make(number)) as items:
            for item in items:
                pipe.send(item)
                room.acquire()
                if stopped.value:
                    return
    except Exception as error:
        reason = out_of_memory(error)
        remedy = "use fewer data.workers, a smaller data.prefetch or a lower data.packing.max_tokens"
        pipe.send(_Failed(traceback.format_exc() if reason is None else f"out of memory ({reason}): {remedy}"))
    while not stopped.value:
        room.acquire()


def _set_up_process(environment: Mapping[str, str]) -> None:
    """Set up environment, threads, memory and signals of a worker process.

    Workers ignore signals that stop a whole process group: the parent stops the workers itself when it is done.
    """
    replace_environment(environment)  # They may contain credentials.
    torch.set_num_threads(1)
    _limit_arenas()
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with(parent.sentinel)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _limit_arenas() -> None:
    """Limit glibc to two memory arenas.

    The object store's client has many threads. By default glibc gives them up to eight arenas per core, and an arena
    keeps the memory of its peak. Two arenas are as fast; on two cores they keep a tenth less memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # Only glibc has it.
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
