"""Processes that make items ahead of the one that takes them.

    worker w: item, item, ... --its pipe--> take(w)
                    ^--- room for another ---'

A worker writes into its own pipe, from the thread that makes the items, and is told by nothing but a semaphore that
there is room: no thread stands between, and a worker that dies closes its pipe. ``DataLoader`` takes two queues, three
threads and a tenth of a millisecond more for each item. Not for: work that is dealt out task by task
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
from data_pipeline.io.processes import end_with, ending, without_script

T = TypeVar("T")

Make = Callable[[int], Generator[T, None, None]]
"""The items of a worker, by its number; called in its process."""

_JOIN_SECONDS = 5.0
_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""


@dataclass(frozen=True)
class _Failed:
    """What a worker sends when it failed in a way that nobody foresaw."""

    trace: str


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    room: Semaphore


class Workers(Generic[T]):
    """Running workers.

    Args:
        make: Their items. After the last one, a worker waits until it is closed, for what it shares may still be used.
        count: Workers.
        ahead: Items that a worker makes before the first of them is taken, at least 1.
        clean: Start them from a clean process, not as Python does it here: a fork loses this process's threads.
        preload: Modules that are imported once for all of them, by the clean process or by this one.
    """

    def __init__(self, make: Make[T], count: int, ahead: int, *, clean: bool, preload: tuple[str, ...] = ()) -> None:
        context: BaseContext = multiprocessing.get_context("forkserver" if clean else None)
        if clean:
            context.set_forkserver_preload(list(preload))
        else:
            for module in preload:
                importlib.import_module(module)
        self._workers: list[_Worker] = []
        stopped = context.RawValue("b", 0)  # Without a lock: a killed worker leaves none behind that it held.
        self._stop = weakref.finalize(self, _stop, self._workers, stopped, os.getpid())
        # Workers ignore SIGTERM, so they must be told to leave before multiprocessing terminates and joins them.
        atexit.register(self._stop)
        try:
            for number in range(count):
                self._workers.append(_start(context, make, number, ahead, stopped))
        except OSError as error:
            started = len(self._workers)
            self.close()
            raise WorkerError(
                f"{started} of {count} loader workers started, the next could not: {error.strerror or error}. Each "
                "needs 4 KiB of /dev/shm (docker run --shm-size=64m), three file handles and a process; raise what is "
                "short, or lower data.workers"
            ) from error

    @property
    def processes(self) -> list[BaseProcess]:
        """Those that run, by number."""
        return [worker.process for worker in self._workers]

    def take(self, number: int) -> T:
        """The next item of a worker; waits for it.

        Raises:
            WorkerError: it died, or failed in a way that its items do not tell of.
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
            raise WorkerError(f"loader worker {number} failed:\n{item.trace}")
        worker.room.release()
        return cast(T, item)

    def close(self) -> None:
        """Ends the workers. Idempotent."""
        self._stop()
        atexit.unregister(self._stop)


def _start(context: BaseContext, make: Make[T], number: int, ahead: int, stopped: Any) -> _Worker:
    pipe, there = context.Pipe(duplex=False)
    room = context.Semaphore(ahead)
    process = cast(Any, context).Process(
        target=_work,
        args=(make, number, there, room, stopped, dict(os.environ)),
        name=f"loader-{number}",
        daemon=True,
    )
    with contextlib.nullcontext() if context.get_start_method() == "fork" else without_script():
        process.start()
    there.close()  # Before the next fork: the pipe ends when its worker does.
    return _Worker(process, pipe, room)


def _stop(workers: list[_Worker], stopped: Any, owner: int) -> None:
    """Ends the workers, those that do not end soon by force."""
    if os.getpid() != owner:  # A fork has copies of the handles, not the workers.
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
    """Takes what the worker still sends, which it may wait to get rid of."""
    with contextlib.suppress(EOFError, OSError):
        while (left := deadline - time.monotonic()) > 0:
            if worker.pipe not in wait([worker.pipe, worker.process.sentinel], left):
                return
            worker.pipe.recv_bytes()


def _work(
    make: Make[T], number: int, pipe: Connection, room: Semaphore, stopped: Any, environment: Mapping[str, str]
) -> None:
    """The process of a worker."""
    _settle(environment)
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
        spare = "use fewer data.workers, a smaller data.prefetch or a lower data.packing.max_tokens"
        pipe.send(_Failed(traceback.format_exc() if reason is None else f"out of memory ({reason}): {spare}"))
    while not stopped.value:
        room.acquire()


def _settle(environment: Mapping[str, str]) -> None:
    """Makes a worker of this process.

    The parent decides when to stop: a signal to the whole process group must not tear workers from under it.
    """
    os.environ.update(environment)  # One that is not forked from the parent may lack its credentials.
    torch.set_num_threads(1)
    _limit_arenas()
    parent = multiprocessing.parent_process()
    if parent is not None:
        end_with(parent.sentinel)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _limit_arenas() -> None:
    """Bounds what glibc keeps for reuse where remote data are read.

    It gives the threads of the object store's client up to eight arenas a core, hundreds on a large machine, and each
    keeps the most that it ever held. Two are as fast; on two cores they keep a tenth less.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # Only glibc has it.
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
