"""Trying again: exponential back-off with full jitter, within a bounded time.

The jitter comes from the system's generator, so it touches no seed: data do not depend on how often a read failed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from data_pipeline.errors import StorageError

R = TypeVar("R")
Sleep = Callable[[float], Awaitable[None]]

_FIRST_SECONDS = 0.1
_LONGEST_SECONDS = 20.0
_LOUD_AFTER = 3  # One reset is everyday weather; from here on a person may want to know.
_LOG = logging.getLogger("data_pipeline.storage")


class TransientError(Exception):
    """An attempt failed in a way that may pass: a 5xx, 429, a reset, a slow or a short answer."""


class Retry:
    """Runs attempts until one succeeds or the time is over.

    Args:
        total_seconds: No attempt starts later than this after the first one.
        sleep: For tests.
        clock: For tests.

    Source: Brooker 2015, "Exponential Backoff And Jitter" (full jitter).
    """

    def __init__(
        self, total_seconds: float, *, sleep: Sleep = asyncio.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total_seconds
        self._sleep = sleep
        self._clock = clock
        self._random = random.SystemRandom()

    async def run(self, attempt: Callable[[], Awaitable[R]], what: str) -> R:
        """The result of the first attempt that works.

        Args:
            attempt: Raises ``TransientError`` if it is worth another try; everything else passes through.
            what: Names the object in messages.

        Raises:
            StorageError: the time is over; names the last reason.
        """
        start, count = self._clock(), 0
        while True:
            try:
                return await attempt()
            except TransientError as error:
                count += 1
                pause = self._random.uniform(0, min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** (count - 1)))
                elapsed = self._clock() - start
                if elapsed + pause > self._total:
                    raise StorageError(
                        f"{what}: {count} attempts in {elapsed:.0f} s failed (data.storage.retry_seconds="
                        f"{self._total:g}); the last: {error}"
                    ) from error
                if count >= _LOUD_AFTER:
                    _LOG.warning("%s: attempt %d failed, next in %.1f s: %s", what, count, pause, error)
                await self._sleep(pause)
