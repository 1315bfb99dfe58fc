from __future__ import annotations

import asyncio
import random

import pytest

from data_pipeline.errors import StaleError, StorageError
from data_pipeline.storage.retry import Retry, TransientError


class Clock:
    """A clock that only ``sleep`` advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


def run(failures: int | Exception, total: float, clock: Clock) -> str:
    tries = 0

    async def attempt() -> str:
        nonlocal tries
        tries += 1
        if isinstance(failures, Exception):
            raise failures
        if tries <= failures:
            raise TransientError("status 503")
        return f"try {tries}"

    retry = Retry(total, sleep=clock.sleep, clock=lambda: clock.now)
    return asyncio.run(retry.run(attempt, "s3://bucket/x.tar"))


def test_pauses_grow_within_doubling_bounds_and_are_spread_over_them() -> None:
    firsts, lasts = [], []
    for _ in range(200):
        clock = Clock()
        assert run(6, 1e9, clock) == "try 7"
        assert all(0 <= pause <= 0.1 * 2**i for i, pause in enumerate(clock.pauses))
        firsts.append(clock.pauses[0] / 0.1)
        lasts.append(clock.pauses[5] / 3.2)
    # Full jitter: uniform over [0, bound]. 200 draws miss a half with a probability of 2^-200.
    for shares in (firsts, lasts):
        assert min(shares) < 0.5 < max(shares)


def test_no_pause_is_longer_than_the_longest() -> None:
    clock = Clock()
    run(30, 1e9, clock)
    assert max(clock.pauses) <= 20


def test_gives_up_within_the_time_and_says_why() -> None:
    clock = Clock()
    with pytest.raises(StorageError, match=r"s3://bucket/x.tar: \d+ attempts in \d+ s .*retry_seconds=60.*status 503"):
        run(10**9, 60, clock)
    assert clock.now <= 60
    assert len(clock.pauses) > 3


def test_what_cannot_pass_is_tried_once() -> None:
    clock = Clock()
    with pytest.raises(StaleError):
        run(StaleError("replaced"), 60, clock)
    assert clock.pauses == []


def test_jitter_leaves_seeded_generators_alone() -> None:
    random.seed(5)
    before = random.getstate()
    run(4, 1e9, Clock())
    assert random.getstate() == before
