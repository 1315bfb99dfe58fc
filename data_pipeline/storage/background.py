"""An event loop in a thread: requests overlap, and closing ends them at once.

One per process. ``obstore`` keeps threads that a forked child does not have; a child would wait for them for ever, so a
use on the other side of a fork is refused.
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
"""Process that started ``obstore``'s threads; they are lost in its forked children."""


def check_process() -> None:
    """Refuses what would hang.

    Raises:
        StorageError: an ancestor of this process has used ``obstore`` before it forked.
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
    """Runs coroutines in a thread of its own, from the first one on."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, R]) -> Future[R]:
        """Starts a coroutine; its result comes later."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """The result of a coroutine.

        Raises:
            StorageError: closed while it ran.
        """
        future = self.start(coroutine)
        try:
            return future.result()
        except CancelledError as error:
            raise StorageError("the storage was closed during a read") from error
        except BaseException:
            future.cancel()  # An interrupt of the caller; the request is not needed any more.
            raise

    def call(self, function: Any, *arguments: Any) -> None:
        """Calls a function in the thread, soon."""
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
                # The interpreter must not end while the thread is in a call of obstore.
                atexit.register(_close, weakref.ref(self))
            return self._loop

    def close(self) -> None:
        """Cancels what runs and ends the thread. Idempotent."""
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
