"""How long steps take and how fast the run is: clocks, moving averages, and the progress line of rank 0.

    waiting_for_data() ... finish_step(tokens, samples) -> StepTiming   (this step, exactly)
    meter.rates() -> Rates --> ProgressLine                             (moving averages, for people)

A terminal gets a live bar, a log file a plain line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
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


def format_count(value: float) -> str:
    """A rate or count in three digits: ``950``, ``12.3k``, ``4.56M``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """A duration: ``42s``, ``3m07s``, ``2h05m``, ``3d04h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def describe(loss: float, rates: Rates) -> str:
    """The figures of the progress line, after the step count."""
    return (
        f"loss {loss:.4f} · {format_count(rates.tokens_per_second)} tokens/s · "
        f"{format_count(rates.samples_per_second)} samples/s · wait {100 * rates.data_wait_share:.0f}% · "
        f"ETA {format_seconds(rates.eta_seconds)}"
    )


class ProgressLine:
    """Shows where the run is.

    Args:
        console: Where to print; a terminal gets a live bar.
        start_step: Steps done before.
        total_steps: Step count at the end.
        plain_line_seconds: Seconds between two lines where there is no terminal.
        clock: Seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        console: Console,
        start_step: int,
        total_steps: int,
        plain_line_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._every = plain_line_seconds
        self._clock = clock
        self._last_line: float | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, figures="")
            self._bar.start()

    def update(self, step: int, loss: float, rates: Rates, stage: str) -> None:
        """Shows the figures of a finished step."""
        figures = describe(loss, rates)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=stage, figures=figures)
            return
        now = self._clock()
        due = self._last_line is None or now - self._last_line >= self._every
        if due or step == self._total_steps:
            self._last_line = now
            self.note(f"{stage} · step {step}/{self._total_steps} · {figures}")

    def note(self, text: str) -> None:
        """Prints one line of its own, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()
