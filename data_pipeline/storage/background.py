"""An event loop in a background thread, in which remote requests overlap. Closing it cancels them.

``obstore`` uses threads that a forked child process lacks. If the parent had used ``obstore`` before the fork, a
request in the child would hang forever, so every use in the child raises instead.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from data_pipeline.errors import StorageError

R = TypeVar("R")

_first_user: int | None = None
"""Id of the process that started ``obstore``'s threads. Its forked children lack these threads."""


def check_process() -> None:
    """Raise if a request in this process would hang.

    Raises:
        StorageError: this process was forked from one that had used ``obstore``.
    """
    global _first_user
    if _first_user is None:
        _first_user = os.getpid()
    if _first_user != os.getpid():
        raise StorageError(
            "this process was forked from one that has read remote objects, and lacks the threads for it; "
            "start it with multiprocessing's forkserver or spawn (mmscale's own workers do)"
        )


class Background:
    """Runs coroutines in its own thread, which starts with the first coroutine."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, R]) -> Future[R]:
        """Start a coroutine; return a future of its result.

        Raises:
            StorageError: this object is closed, or the process was forked (``check_process``).
        """
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine and return its result. Blocks; must not be called in the background thread.

        Raises:
            StorageError: as ``start``, or this object was closed meanwhile.
        """
        future = self.start(coroutine)
        try:
            return future.result()
        except CancelledError as error:
            raise StorageError("the storage was closed during a read") from error
        except BaseException:
            future.cancel()  # The caller was interrupted, or the coroutine failed.
            raise

    def call(self, function: Any, *arguments: Any) -> None:
        """Schedule a function call in the background thread; return immediately."""
        self._running().call_soon_threadsafe(function, *arguments)

    def _running(self) -> asyncio.AbstractEventLoop:
        check_process()
        with self._lock:
            if self._closed:
                raise StorageError("this storage is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="storage", daemon=True)
                self._thread.start()
                # Join the thread before the interpreter exits, because it may be inside a call of obstore.
                atexit.register(_close, weakref.ref(self))
            return self._loop

    def close(self) -> None:
        """Cancel all coroutines and end the thread. Idempotent."""
        with self._lock:
            loop, thread, self._closed = self._loop, self._thread, True
            self._loop = None
        if loop is None or thread is None or not thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _close(reference: weakref.ref[Background]) -> None:
    background = reference()
    if background is not None:
        background.close()
