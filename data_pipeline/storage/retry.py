"""Retry with exponential backoff and full jitter, within a bounded time.

The jitter comes from the system's random generator, so retries do not change the seeded order of the data.
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
_WARN_AFTER = 3  # One or two failures are normal, so do not log them.
_LOG = logging.getLogger("data_pipeline.storage")


class TransientError(Exception):
    """A failure worth a retry: status 408, 425, 429 or 5xx, a connection error, a timeout or an incomplete response."""


class Retry:
    """Repeats an operation until it succeeds or the time is over.

    Args:
        total_seconds: No attempt starts later than this many seconds after the first one.
        sleep: Replaced in tests.
        clock: Replaced in tests.

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
        """Return the result of the first successful attempt.

        Args:
            attempt: Raises ``TransientError`` to be retried. Other exceptions pass through.
            what: Name of the object in messages.

        Raises:
            StorageError: the time is over. The message contains the last failure.
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
                        f"{self._total:g}); the last failure: {error}"
                    ) from error
                if count >= _WARN_AFTER:
                    _LOG.warning("%s: attempt %d failed, retrying in %.1f s: %s", what, count, pause, error)
                await self._sleep(pause)
