"""Clocks and averages of the step loop: how long, how fast, how much of it waiting for data, how long still.

waiting_for_data() ... finish_step(tokens, samples) -> StepTiming   (this step, exactly)
meter.rates() -> Rates                                              (moving averages, for people)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import record_function


class MovingAverage:
    """Exponential moving average without the pull towards its start at 0.

    Args:
        smoothing: Weight of the past in [0, 1).

    Source: Kingma and Ba 2015, "Adam", section 3 (initialisation bias correction).
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._total = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        """Takes in one value."""
        self._total = self._smoothing * self._total + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)

    @property
    def value(self) -> float:
        """The average so far; 0 before the first value."""
        return self._total / self._weight if self._weight else 0.0


@dataclass(frozen=True)
class StepTiming:
    """What one step took.

    Attributes:
        seconds: Wall time since the end of the step before (or since the meter was made).
        data_wait_seconds: The part of it spent waiting for the loader.
    """

    seconds: float
    data_wait_seconds: float


@dataclass(frozen=True)
class Rates:
    """Moving averages. ``data_wait_share`` lies in [0, 1]; ``eta_seconds`` is 0 when the last step is done."""

    tokens_per_second: float
    samples_per_second: float
    data_wait_share: float
    eta_seconds: float


class StepMeter:
    """Measures the steps of one process.

    Rates are ratios of averages (tokens over seconds), not averages of ratios: a short step must not count as much
    as a long one.

    Args:
        start_step: Steps done before this process started.
        total_steps: Step count at which the run ends.
        smoothing: See ``MovingAverage``.
        clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        start_step: int,
        total_steps: int,
        smoothing: float = 0.95,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._step = start_step
        self._total_steps = total_steps
        self._last_end = clock()
        self._data_wait = 0.0
        self._seconds, self._waited, self._tokens, self._samples = (MovingAverage(smoothing) for _ in range(4))

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the enclosed time as data wait of the present step."""
        start = self._clock()
        try:
            with record_function("data"):
                yield
        finally:
            self._data_wait += self._clock() - start

    def pause(self) -> None:
        """Starts the present step's clock again: time since the last step (a checkpoint, a stage) counts for none."""
        self._last_end = self._clock()
        self._data_wait = 0.0

    def finish_step(self, num_tokens: int, num_samples: int) -> StepTiming:
        """Ends the present step, which handled so many tokens and samples over all ranks."""
        now = self._clock()
        timing = StepTiming(now - self._last_end, self._data_wait)
        self._last_end = now
        self._data_wait = 0.0
        self._step += 1
        self._seconds.add(timing.seconds)
        self._waited.add(timing.data_wait_seconds)
        self._tokens.add(num_tokens)
        self._samples.add(num_samples)
        return timing

    def rates(self) -> Rates:
        """The moving averages after the last finished step."""
        seconds = self._seconds.value
        per_second = 1 / seconds if seconds > 0 else 0.0
        return Rates(
            tokens_per_second=self._tokens.value * per_second,
            samples_per_second=self._samples.value * per_second,
            data_wait_share=min(1.0, self._waited.value * per_second),
            eta_seconds=max(0, self._total_steps - self._step) * seconds,
        )
