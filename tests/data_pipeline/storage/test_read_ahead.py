"""Fetching in the background within a budget: who waits for what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage.background import Background
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.read_ahead import ReadAhead, Stretch

SECONDS = 20
"""More than any of this takes: whoever waits longer waits for ever."""


async def at_once() -> None:
    """Needs no time."""


class ZeroBytes:
    """An object of zeros, which does something ``first``."""

    def __init__(self, first: Callable[[], Awaitable[Any]]) -> None:
        self._first = first

    async def read(self, ranges: Sequence[Range]) -> list[bytes]:
        await self._first()
        return [bytes(span.size) for span in ranges]


def stretch(
    size: int, *, located: Callable[[], Awaitable[Any]] = at_once, read: Callable[[], Awaitable[Any]] = at_once
) -> Stretch:
    async def locate() -> Any:
        await located()
        return ZeroBytes(read), Range(0, size)

    return Stretch(object(), locate)


@pytest.fixture
def background() -> Iterator[Background]:
    running = Background()
    yield running
    running.close()


def test_what_has_room_is_in_memory_and_what_has_none_is_left_to_the_reader(background: Background) -> None:
    ahead = ReadAhead(background, budget_bytes=10)
    first, second = ahead.expect("lane", [stretch(8), stretch(8)])
    assert first.settled.wait(SECONDS)
    assert first.get(2, 6) == bytes(4)
    assert second.settled.wait(SECONDS)
    assert second.get(2, 6) is None

    ahead.expect("lane", [second])  # The first is let go; its room is the second's.
    assert second.task is not None
    second.task.result(SECONDS)
    assert second.get(2, 6) == bytes(4)
    assert ahead._used == 8


def test_a_fetch_that_comes_while_the_turn_is_handed_on_stands_behind_and_holds_up_no_reader(
    background: Background,
) -> None:
    """Else its reader waits for room, which is made only when that reader goes on."""
    ahead = ReadAhead(background, budget_bytes=10)
    all_in_line, handed_on = asyncio.Event(), asyncio.Event()

    async def fail() -> None:
        await all_in_line.wait()
        asyncio.get_running_loop().call_soon(handed_on.set)  # One turn of the loop later, when the holder has room.
        raise StorageError("gone")

    failing, holder, following = stretch(10, read=fail), stretch(2), stretch(8)
    late = stretch(8, located=handed_on.wait)
    ahead.expect("lane", [failing, holder, following, late])
    background.run(at_once())  # It began after the others, so they stand in line.
    background.call(all_in_line.set)
    assert late.settled.wait(SECONDS), "the last one's reader waits for ever"
    assert late.get(0, 8) is None
    for one in (holder, following):
        assert one.task is not None
        one.task.result(SECONDS)
    assert (holder.get(0, 2), following.get(0, 8)) == (bytes(2), bytes(8))
    with pytest.raises(StorageError, match="gone"):
        failing.get(0, 10)
