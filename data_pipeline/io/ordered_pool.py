"""Work on tasks in several processes, results in the order of the tasks.

    tasks 0 1 2 3 4 ...  --task i to process i mod N-->  pieces  --read process by process-->  0 1 2 3 4 ...

For: every offline command that works in several processes (ingest, export, verify, stats, dedup); its results must not
depend on their number. A process works ahead until ``_AHEAD_BYTES`` of its pieces wait to be fetched, so memory is
bounded whatever the tasks hold. Processes end when their pipe closes, hence also when the caller was killed.
``concurrent.futures`` would keep every result whole until the caller asks for it. Not for: the loader's workers.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

from data_pipeline.errors import DataConfigError, DataPipelineError, WorkerError, out_of_memory
from data_pipeline.io.processes import ending, without_script

Task = TypeVar("Task")
Piece = TypeVar("Piece")

_AHEAD_BYTES = 64 << 20
_AHEAD_TASKS = 2
"""Tasks that a process has at most: one that it works on, one that waits."""
_JOIN_SECONDS = 5.0


class _Message(NamedTuple):
    """From a process: a piece, the end of its task (neither), or an error."""

    piece: Any = None
    error: BaseException | None = None
    is_end: bool = False


def in_order(work: Callable[[Task], Iterator[Piece]], tasks: Iterable[Task], workers: int) -> Iterator[Piece]:
    """Pieces of all tasks, in the order of tasks, whatever ``workers`` is.

    Args:
        work: Gives the pieces of a task. With workers it and the tasks are sent to other processes: a dataclass with
            ``__call__``, not a lambda.
        tasks: Taken one by one, a few ahead.
        workers: Processes; 0 works in this one.

    Raises:
        WorkerError: a process died, or failed in a way of its own; the message holds its traceback.
        DataPipelineError, OSError: what ``work`` raised.
    """
    if workers < 0:
        raise DataConfigError(f"workers={workers}: must be 0 (this process) or more")
    if workers == 0:
        for task in tasks:
            yield from work(task)
        return
    crew = [_Worker(work) for _ in range(workers)]
    try:
        waiting: collections.deque[_Worker] = collections.deque()
        for number, task in enumerate(tasks):
            if len(waiting) == _AHEAD_TASKS * workers:
                yield from waiting.popleft().pieces()
            worker = crew[number % workers]
            worker.send(task)
            waiting.append(worker)
        while waiting:
            yield from waiting.popleft().pieces()
    finally:
        for worker in crew:
            worker.close()


class _Worker:
    """One process, seen from the caller."""

    def __init__(self, work: Callable[[Any], Iterator[Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with without_script():
            self._process.start()
        theirs.close()  # Else its end would not be noticed here.

    def send(self, task: Any) -> None:
        try:
            self._pipe.send(task)
        except OSError as error:
            raise self._died() from error

    def pieces(self) -> Iterator[Any]:
        """The pieces of the oldest task that was sent and not fetched."""
        while True:
            try:
                message: _Message = self._pipe.recv()
            except (EOFError, OSError) as error:
                raise self._died() from error
            if message.error is not None:
                raise message.error
            if message.is_end:
                return
            yield message.piece

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_JOIN_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _died(self) -> WorkerError:
        self._process.join(_JOIN_SECONDS)
        return WorkerError(
            f"a worker process exited without an error message ({ending(self._process)}): out of memory? "
            "What is finished stays: the same command goes on from there"
        )


def _serve(pipe: Connection, work: Callable[[Any], Iterator[Any]]) -> None:
    """The life of a worker process: one thread takes tasks, one sends results, this one works."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the caller decides.
    inbox: queue.Queue[Any] = queue.Queue()
    outbox = _Outbox(pipe)
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    threading.Thread(target=outbox.run, daemon=True).start()
    while True:
        task = inbox.get()
        try:
            for piece in work(task):
                outbox.put(_Message(piece))
        except (DataPipelineError, OSError) as error:
            outbox.put(_Message(error=error))
        except BaseException as error:
            # A defect is shown where the caller is, with this process's traceback; a lack of memory is none.
            reason = out_of_memory(error)
            text = traceback.format_exc() if reason is None else f"out of memory ({reason}): use fewer processes"
            outbox.put(_Message(error=WorkerError(f"a worker process failed:\n{text}")))
        else:
            outbox.put(_Message(is_end=True))


def _receive(pipe: Connection, inbox: queue.Queue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(pipe.recv())
    os._exit(0)  # Nobody is left to work for: do not finish what is in hand.


class _Outbox:
    """Messages on their way, at most ``_AHEAD_BYTES`` of them or a single larger one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._messages: collections.deque[memoryview] = collections.deque()
        self._num_bytes = 0
        self._changed = threading.Condition()

    def put(self, message: _Message) -> None:
        data = ForkingPickler.dumps(message)
        with self._changed:
            self._changed.wait_for(lambda: not self._messages or self._num_bytes + len(data) <= _AHEAD_BYTES)
            self._messages.append(data)
            self._num_bytes += len(data)
            self._changed.notify_all()

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._messages))
                data = self._messages.popleft()
                self._num_bytes -= len(data)
                self._changed.notify_all()
            try:
                self._pipe.send_bytes(data)
            except OSError:
                os._exit(0)
