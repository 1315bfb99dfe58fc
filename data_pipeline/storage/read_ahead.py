"""Fetching what is needed next, in the background, within a budget of memory.

Each owner (a lane) names the stretches that it needs now and next. A stretch is fetched by as few requests as its size
takes, whatever the number of samples in it, and stays in memory until its owner names others. A stretch that finds no
room waits; a reader that needs it meanwhile reads for itself.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Future

from data_pipeline.storage.background import Background
from data_pipeline.storage.objects import RemoteObject
from data_pipeline.storage.ranges import Range

Locate = Callable[[], Awaitable[tuple[RemoteObject, Range]]]


class Stretch:
    """Neighbouring bytes of one object, on their way or in memory.

    Args:
        key: What it is; equal keys of one owner are fetched once.
        locate: Tells the object and its bytes, when it is time to ask.
    """

    def __init__(self, key: Hashable, locate: Locate) -> None:
        self.key = key
        self.locate = locate
        self.span: Range | None = None
        self.data: bytes | None = None
        self.reserved = 0
        """Bytes of the budget that it holds."""
        self.settled = threading.Event()
        """Set when it is in memory, failed, dropped, or waits for room: a reader need not wait any longer."""
        self.error: BaseException | None = None
        self.task: Future[None] | None = None

    def get(self, first: int, end: int) -> bytes | None:
        """Bytes of the object; waits while they are on their way, None if the reader must see to it itself.

        Raises:
            StorageError, ManifestError: fetching failed.
        """
        self.settled.wait()
        if self.error is not None:
            raise self.error
        data, span = self.data, self.span
        if data is None or span is None or first < span.start or end > span.end:
            return None
        return data[first - span.start : end - span.start]


class ReadAhead:
    """Stretches of all readers of a process.

    Args:
        background: Where fetches run.
        budget_bytes: Memory for stretches, all owners together; a single larger stretch is fetched alone.
    """

    def __init__(self, background: Background, budget_bytes: int) -> None:
        self._background = background
        self._budget = budget_bytes
        self._used = 0
        self._wanted: dict[Hashable, dict[Hashable, Stretch]] = {}
        self._turn: asyncio.Lock = asyncio.Lock()
        self._in_line = 0
        """Fetches that have the turn or wait for it. The lock alone does not tell: while it is handed on it is free."""
        self._room: asyncio.Event = asyncio.Event()

    def expect(self, owner: Hashable, stretches: Sequence[Stretch]) -> list[Stretch]:
        """Names all that ``owner`` needs, in order; what it does not name any more is let go.

        Returns:
            For each the one that will answer: that of before where the key is the same.
        """
        before = self._wanted.get(owner, {})
        now = {stretch.key: before.get(stretch.key, stretch) for stretch in stretches}
        for key, stretch in before.items():
            if key not in now:
                self._let_go(stretch)
        self._wanted[owner] = now
        for stretch in now.values():
            if not self._budget:
                stretch.settled.set()  # Nobody fetches it: a reader must not wait.
            elif stretch.task is None:
                stretch.task = self._background.start(self._fetch(stretch))
        return [now[stretch.key] for stretch in stretches]

    def _let_go(self, stretch: Stretch) -> None:
        stretch.settled.set()
        if stretch.task is not None:
            stretch.task.cancel()
            self._background.call(self._free, stretch)

    async def _fetch(self, stretch: Stretch) -> None:
        try:
            remote, span = await stretch.locate()
            await self._reserve(stretch, span.size)
            stretch.span = span
            (stretch.data,) = await remote.read([span])
        except asyncio.CancelledError:
            self._free(stretch)
            raise
        except Exception as error:  # Whoever needs these bytes gets it.
            self._free(stretch)
            stretch.error = error
        finally:
            stretch.settled.set()

    async def _reserve(self, stretch: Stretch, size: int) -> None:
        if self._in_line or not self._fits(size):
            stretch.settled.set()
        self._in_line += 1
        try:
            async with self._turn:  # First come, first served.
                while not self._fits(size):
                    self._room.clear()
                    await self._room.wait()
                self._used += size
                stretch.reserved = size
        finally:
            self._in_line -= 1

    def _fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._budget

    def _free(self, stretch: Stretch) -> None:
        """Called in the thread of the loop."""
        self._used -= stretch.reserved
        stretch.reserved, stretch.data = 0, None
        self._room.set()
