"""Prefetching within a memory budget: which fetches and readers wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage.background import Background
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.read_ahead import PrefetchedRange, ReadAhead

SECONDS = 20
"""Longer than any step of these tests takes; a longer wait means a deadlock."""


async def at_once() -> None:
    """Return immediately."""


class ZeroBytes:
    """An object of zeros; a read awaits ``first``."""

    def __init__(self, first: Callable[[], Awaitable[Any]]) -> None:
        self._first = first

    async def read(self, ranges: Sequence[Range]) -> list[bytes]:
        await self._first()
        return [bytes(one.size) for one in ranges]


def prefetched(
    size: int, *, located: Callable[[], Awaitable[Any]] = at_once, read: Callable[[], Awaitable[Any]] = at_once
) -> PrefetchedRange:
    async def locate() -> Any:
        await located()
        return ZeroBytes(read), Range(0, size)

    return PrefetchedRange(object(), locate)


@pytest.fixture
def background() -> Iterator[Background]:
    running = Background()
    yield running
    running.close()


def test_what_has_room_is_in_memory_and_what_has_none_is_left_to_the_reader(background: Background) -> None:
    ahead = ReadAhead(background, budget_bytes=10)
    first, second = ahead.prefetch("lane", [prefetched(8), prefetched(8)])
    assert first.settled.wait(SECONDS)
    assert first.get(2, 6) == bytes(4)
    assert second.settled.wait(SECONDS)
    assert second.get(2, 6) is None

    ahead.prefetch("lane", [second])  # The first range is dropped, so the second one gets its memory.
    assert second.task is not None
    second.task.result(SECONDS)
    assert second.get(2, 6) == bytes(4)
    assert ahead._used == 8


def test_a_fetch_that_comes_while_the_turn_is_holder_has_room_stands_behind_and_holds_up_no_reader(
    background: Background,
) -> None:
    """Otherwise the reader would wait for memory that is freed only after the reader continues."""
    ahead = ReadAhead(background, budget_bytes=10)
    all_waiting, holder_has_room = asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        await all_waiting.wait()
        asyncio.get_running_loop().call_soon(
            holder_has_room.set
        )  # In the next iteration of the loop, when ``holder`` has its memory.
        raise StorageError("gone")

    failing, holder, following = prefetched(10, read=fail), prefetched(2), prefetched(8)
    late = prefetched(8, located=holder_has_room.wait)
    ahead.prefetch("lane", [failing, holder, following, late])
    background.run(at_once())  # The background runs coroutines in order, so the others are waiting by now.
    background.call(all_waiting.set)
    assert late.settled.wait(SECONDS), "the reader of the last range is blocked"
    assert late.get(0, 8) is None
    for one in (holder, following):
        assert one.task is not None
        one.task.result(SECONDS)
    assert (holder.get(0, 2), following.get(0, 8)) == (bytes(2), bytes(8))
    with pytest.raises(StorageError, match="gone"):
        failing.get(0, 10)
