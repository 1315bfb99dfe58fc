"""Process tasks in several worker processes; yield their results in the order of the tasks.

    tasks 0 1 2 3 4 ...  --task i to process i mod N-->  results  --read in the order of tasks-->  0 1 2 3 4 ...

All offline commands that use several processes (ingest, export, verify, stats, dedup) use this pool, because their
output must not depend on the number of processes. A task yields any number of results. A worker process works ahead
until ``_MAX_QUEUED_BYTES`` of its results wait to be read, so memory use is bounded. ``concurrent.futures`` would hold
all results of a task in memory. Worker processes exit when their pipe closes, even if the caller was killed.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

from data_pipeline.errors import DataConfigError, DataPipelineError, WorkerError, out_of_memory
from data_pipeline.io.processes import ending, replace_environment, without_script

Task = TypeVar("Task")
Result = TypeVar("Result")

_MAX_QUEUED_BYTES = 64 << 20
_TASKS_PER_WORKER = 2
"""Largest number of tasks sent to one worker process: one in progress, one waiting."""
_JOIN_SECONDS = 5.0


class _Message(NamedTuple):
    """Message of a worker process: a result, the end of a task, or an error."""

    result: Any = None
    error: BaseException | None = None
    is_end: bool = False


def in_order(work: Callable[[Task], Iterator[Result]], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield the results of all tasks, in the order of the tasks, for any number of ``workers``.

    Args:
        work: Yields the results of a task. With ``workers`` above 0, it is pickled, as are tasks and results: use a
            dataclass with ``__call__`` instead of a lambda.
        tasks: Consumed lazily, up to two tasks per process ahead.
        workers: Number of worker processes; 0 works in this process.

    Raises:
        DataConfigError: ``workers`` is negative.
        DataPipelineError, OSError: raised by ``work``.
        WorkerError: a worker process died, or ``work`` raised any other exception there; the message contains its
            traceback. With ``workers`` 0, such an exception passes through.
    """
    if workers < 0:
        raise DataConfigError(f"workers={workers}: must be 0 (this process) or more")
    if workers == 0:
        for task in tasks:
            yield from work(task)
        return
    pool = [_Worker(work) for _ in range(workers)]
    try:
        waiting: collections.deque[_Worker] = collections.deque()
        for number, task in enumerate(tasks):
            if len(waiting) == _TASKS_PER_WORKER * workers:
                yield from waiting.popleft().task_results()
            worker = pool[number % workers]
            worker.send(task)
            waiting.append(worker)
        while waiting:
            yield from waiting.popleft().task_results()
    finally:
        for worker in pool:
            worker.close()


class _Worker:
    """The caller's handle of one worker process."""

    def __init__(self, work: Callable[[Any], Iterator[Any]]) -> None:
        # A fork server imports the modules once for all workers. A fork of this process would lose its threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.__module__])
        self._pipe, worker_end = context.Pipe()
        arguments = (worker_end, work, dict(os.environ))
        self._process: ForkServerProcess = context.Process(target=_serve, args=arguments, daemon=True)
        with without_script():
            self._process.start()
        worker_end.close()  # Otherwise this process would not notice that the worker process ended.

    def send(self, task: Any) -> None:
        try:
            self._pipe.send(task)
        except OSError as error:
            raise self._died() from error

    def task_results(self) -> Iterator[Any]:
        """Yield the results of the oldest task whose results were not read yet."""
        while True:
            try:
                message: _Message = self._pipe.recv()
            except (EOFError, OSError) as error:
                raise self._died() from error
            if message.error is not None:
                raise message.error
            if message.is_end:
                return
            yield message.result

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
            "Finished work is kept: run the same command again to continue"
        )


def _serve(pipe: Connection, work: Callable[[Any], Iterator[Any]], environment: Mapping[str, str]) -> None:
    """Run a worker process: one thread receives tasks, one sends results, and this thread works."""
    replace_environment(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; only the caller handles it.
    tasks: queue.Queue[Any] = queue.Queue()
    sender = _Sender(pipe)
    threading.Thread(target=_receive, args=(pipe, tasks), daemon=True).start()
    threading.Thread(target=sender.run, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            for result in work(task):
                sender.put(_Message(result))
        except (DataPipelineError, OSError) as error:
            sender.put(_Message(error=error))
        except BaseException as error:
            # A bug is reported to the caller with this process's traceback. Lack of memory is no bug, so it has none.
            reason = out_of_memory(error)
            text = traceback.format_exc() if reason is None else f"out of memory ({reason}): use fewer processes"
            sender.put(_Message(error=WorkerError(f"a worker process failed:\n{text}")))
        else:
            sender.put(_Message(is_end=True))


def _receive(pipe: Connection, tasks: queue.Queue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.put(pipe.recv())
    os._exit(0)  # The caller closed the pipe or died, so its results are not needed.


class _Sender:
    """Sends messages from a queue of at most ``_MAX_QUEUED_BYTES``, or one larger message."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._messages: collections.deque[memoryview] = collections.deque()
        self._num_bytes = 0
        self._changed = threading.Condition()

    def put(self, message: _Message) -> None:
        """Queue a message; block while the queue is full."""
        data = ForkingPickler.dumps(message)
        with self._changed:
            self._changed.wait_for(lambda: not self._messages or self._num_bytes + len(data) <= _MAX_QUEUED_BYTES)
            self._messages.append(data)
            self._num_bytes += len(data)
            self._changed.notify_all()

    def run(self) -> None:
        """Send queued messages until the pipe closes, then end the process."""
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
