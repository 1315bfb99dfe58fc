"""The progress line of rank 0: a live bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mmscale.metrics.meters import Rates


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
