"""Prefetch byte ranges in the background, within a memory budget.

Each owner, such as a lane, lists the ranges that it needs now and next. A range is fetched with as few requests as its
size allows, and stays in memory until its owner drops it from the list. If the budget has no room for a range, the
range waits. A reader that needs it meanwhile must fetch the bytes itself.
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


class PrefetchedRange:
    """A byte range of one object that is being fetched, waits for room, or is in memory.

    Args:
        key: Identifies the range. Ranges of one owner with equal keys are fetched once.
        locate: Coroutine function that returns the object and the byte range, called when the fetch starts.
    """

    def __init__(self, key: Hashable, locate: Locate) -> None:
        self.key = key
        self.locate = locate
        self.byte_range: Range | None = None
        self.data: bytes | None = None
        self.reserved = 0
        """Bytes of the budget that this range occupies."""
        self.settled = threading.Event()
        """Set when ``get`` must not block any more: the fetch ended or failed, or the range was dropped or waits."""
        self.error: BaseException | None = None
        self.task: Future[None] | None = None

    def get(self, first: int, end: int) -> bytes | None:
        """Return the bytes [first, end) of the object; None if the caller must fetch them itself.

        Blocks while the range is being fetched.

        Raises:
            StorageError, ManifestError: the fetch failed.
        """
        self.settled.wait()
        if self.error is not None:
            raise self.error
        data, fetched = self.data, self.byte_range
        if data is None or fetched is None or first < fetched.start or end > fetched.end:
            return None
        return data[first - fetched.start : end - fetched.start]


class ReadAhead:
    """Prefetched ranges of all readers of a process.

    Args:
        background: Runs the fetches.
        budget_bytes: Memory for the ranges of all owners. 0 disables prefetching. A range that is larger than the
            budget is fetched when no other is in memory.
    """

    def __init__(self, background: Background, budget_bytes: int) -> None:
        self._background = background
        self._budget = budget_bytes
        self._used = 0
        self._wanted: dict[Hashable, dict[Hashable, PrefetchedRange]] = {}
        self._reserving: asyncio.Lock = asyncio.Lock()
        self._num_reserving = 0
        """Fetches that hold the lock or wait for it. ``Lock.locked`` is briefly False between two of them."""
        self._freed: asyncio.Event = asyncio.Event()

    def prefetch(self, owner: Hashable, ranges: Sequence[PrefetchedRange]) -> list[PrefetchedRange]:
        """Replace the list of ranges that ``owner`` needs, and start fetching the new ones in order.

        Ranges of the owner's earlier list that are missing from ``ranges`` are cancelled or freed.

        Returns:
            The range to call ``get`` on for each of ``ranges``: the earlier object where the key is equal.
        """
        before = self._wanted.get(owner, {})
        now = {one.key: before.get(one.key, one) for one in ranges}
        for key, one in before.items():
            if key not in now:
                self._drop(one)
        self._wanted[owner] = now
        for one in now.values():
            if not self._budget:
                one.settled.set()  # It is never fetched, so ``get`` must not block.
            elif one.task is None:
                one.task = self._background.start(self._fetch(one))
        return [now[one.key] for one in ranges]

    def _drop(self, dropped: PrefetchedRange) -> None:
        dropped.settled.set()
        if dropped.task is not None:
            dropped.task.cancel()
            self._background.call(self._free, dropped)

    async def _fetch(self, target: PrefetchedRange) -> None:
        try:
            remote, byte_range = await target.locate()
            await self._reserve(target, byte_range.size)
            target.byte_range = byte_range
            (target.data,) = await remote.read([byte_range])
        except asyncio.CancelledError:
            self._free(target)
            raise
        except Exception as error:  # ``get`` raises it.
            self._free(target)
            target.error = error
        finally:
            target.settled.set()

    async def _reserve(self, target: PrefetchedRange, size: int) -> None:
        """Wait until the budget has room for ``size`` bytes. Fetches get room in the order of their calls."""
        if self._num_reserving or not self._fits(size):
            target.settled.set()
        self._num_reserving += 1
        try:
            async with self._reserving:  # asyncio.Lock is fair.
                while not self._fits(size):
                    self._freed.clear()
                    await self._freed.wait()
                self._used += size
                target.reserved = size
        finally:
            self._num_reserving -= 1

    def _fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._budget

    def _free(self, target: PrefetchedRange) -> None:
        """Release the memory of a range. Runs in the background thread. Idempotent."""
        self._used -= target.reserved
        target.reserved, target.data = 0, None
        self._freed.set()
