"""Measure the time of steps, and write each step to ``metrics.jsonl``, TensorBoard and the progress line.

    log = open_run_log(run_dir, config, start_step, total_steps, rank)
    log.begin_stage("align", ...)
    with log.waiting_for_data(): batch = next(batches)
    ...
    log.step(step, report, sums, counters)

Rank 0 writes. Every other rank has a ``NullLog`` with the same methods, so the loop needs no condition on the rank. A
terminal shows a live bar; other output gets a plain line every ``metrics.plain_line_seconds``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.profiler import record_function

from mmscale.engine.engine import StepReport
from mmscale.engine.step_clock import peak_memory
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.format import format_count, format_seconds
from mmscale.metrics.goodput import Spent, WallTime
from mmscale.metrics.sample_images import CaptionedImage
from mmscale.metrics.sinks import JsonlSink, TensorBoardSink
from mmscale.metrics.step_counts import step_metrics
from mmscale.metrics.trackers.trackers import Trackers

UNSEEN_STEPS = 20
"""Steps of a stage without any image before the warning. By then a mixture with few images should contain one."""


@dataclass(frozen=True)
class LoggedStage:
    """The data about a stage that the lines of its steps need.

    Attributes:
        name: Name of the stage.
        datasets: Names of its data sets.
        peak_flops: Peak operations per second of all devices; None if unknown.
        expects_images: Whether the model has a vision tower. If so, and the first ``UNSEEN_STEPS`` steps contain no
            image, a warning is printed. ``check_files`` checks this before a run, but not for streamed and remote data.
    """

    name: str
    datasets: Sequence[str] = ()
    peak_flops: float | None = None
    expects_images: bool = False


class RunLog:
    """Writes ``metrics.jsonl``, TensorBoard and the progress line of a run, and passes images and tables to trackers.

    Args:
        run_dir: The run folder; created if absent.
        config: The ``metrics`` block.
        start_step: Finished steps. Lines of later steps are removed.
        total_steps: Steps of the whole run.
        console: Where to print; standard error by default.
        trackers: The run's trackers, which read the scalars of the steps from ``metrics.jsonl``. The caller closes
            them.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        start_step: int,
        total_steps: int,
        console: Console | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._meter = StepMeter(start_step, total_steps, config.smoothing)
        self._wall_time = WallTime(run_dir, start_step)  # Before JsonlSink removes lost steps.
        self._step, self._checkpoint_seconds = start_step, 0.0
        self._stage, self._unseen_steps_left = LoggedStage(""), 0
        self._jsonl = JsonlSink(run_dir / "metrics.jsonl", start_step)
        self._trackers = trackers or Trackers(run_dir, (), 1)
        self._tensorboard = TensorBoardSink(run_dir / "tensorboard", start_step) if config.tensorboard else None
        self._progress = ProgressLine(
            console or Console(stderr=True), start_step, total_steps, config.plain_line_seconds
        )

    def begin_stage(self, stage: LoggedStage) -> None:
        """Set the stage. Call it before the first step of a start and of each stage."""
        self._stage = stage
        self._unseen_steps_left = UNSEEN_STEPS if stage.expects_images else 0

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Count the enclosed time as data wait of the current step."""
        return self._meter.waiting_for_data()

    def pause(self, spent: Spent = "other") -> None:
        """Count the time since the last step or pause as ``spent`` in the goodput, and not as time of the next step."""
        self._meter.pause()
        seconds = self._wall_time.record_pause(spent, self._step)
        if spent == "checkpoint":
            self._checkpoint_seconds += seconds

    def step(
        self,
        step: int,
        report: StepReport,
        sums: Mapping[str, float],
        counters: Mapping[str, float] | None = None,
        *,
        hold: bool = False,
    ) -> None:
        """Write a finished step.

        ``lr`` of the line is the largest learning rate of any component. ``mfu`` is the time that the model's
        operations would take at the devices' peak, divided by the time of the step.

        Args:
            step: Number of the step, from 1.
            report: Report of the step on this rank.
            sums: ``count_step`` and ``step_flops`` of the step, summed over all ranks.
            counters: Further values by name, such as counts of the run so far.
            hold: Write the line of ``metrics.jsonl`` later: with ``amend``, or before the next line.
        """
        num_tokens, num_samples = int(sums["tokens"]), int(sums["samples"])
        timing = self._meter.finish_step(num_tokens, num_samples)
        peak_flops = self._stage.peak_flops
        mfu = sums["model_flops"] / peak_flops / timing.seconds if peak_flops and timing.seconds else None
        metrics: dict[str, Any] = {
            "loss": report.loss,
            "tokens": num_tokens,
            "samples": num_samples,
            "seconds": timing.seconds,
            "data_wait_seconds": timing.data_wait_seconds,
            "checkpoint_seconds": self._checkpoint_seconds,
            "lr": max(report.learning_rates.values(), default=0.0),
            "grad_norm": report.grad_norm,
            "applied": report.applied,
            "peak_rss_bytes": peak_memory().rss_bytes,
            **{f"lr/{name}": value for name, value in sorted(report.learning_rates.items())},
            **{f"metric/{name}": value for name, value in sorted(report.metrics.items())},
            **({} if mfu is None else {"mfu": mfu}),
            **step_metrics(report, sums, self._stage.datasets),
            **(counters or {}),
            **self._wall_time.step(timing.seconds, timing.data_wait_seconds),
        }
        self._step, self._checkpoint_seconds = step, 0.0
        self._jsonl.write({"step": step, "stage": self._stage.name, **metrics}, hold=hold)
        if self._tensorboard is not None and step % self._config.log_every == 0:
            rate = {"tokens_per_second": num_tokens, "samples_per_second": num_samples}
            per_second = {name: count / max(timing.seconds, 1e-9) for name, count in rate.items()}
            self._tensorboard.scalars(step, {**metrics, **per_second})
        self._trackers.print_notes()
        if self._progress.is_due(step):
            self._progress.update(step, report.loss, self._meter.rates(), self._stage.name)
        if self._unseen_steps_left:
            self._unseen_steps_left = 0 if sums["images"] else self._unseen_steps_left - 1
            if not self._unseen_steps_left and not sums["images"]:
                self.print_line(
                    f"warning: stage {self._stage.name}: the model has a vision tower, but the first {UNSEEN_STEPS} "
                    "steps contained no image, so the tower and the connector learn nothing; check the data sets, or "
                    "set model.vision and model.connector to null"
                )

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the line of ``step``, the last one, and to TensorBoard and the trackers."""
        self._jsonl.amend(step, values)
        self.scalars(step, "heldout", values)

    def scalars(self, step: int, what: str, values: Mapping[str, float]) -> None:
        """Send further values of a step, such as held-out scores, to TensorBoard and the trackers.

        Args:
            step: A finished step, not before that of the last call.
            what: Name of the kind of values. A resumed run does not repeat a kind for the same step.
            values: Values by name.
        """
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, values)
        self._trackers.scalars(step, what, values)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table of a step, such as held-out results, to TensorBoard and the trackers."""
        if self._tensorboard is not None:
            self._tensorboard.table(step, name, columns, rows)
        self._trackers.table(step, name, columns, rows)

    def wants_images(self, step: int) -> bool:
        """Return whether this step writes sample images."""
        every = self._config.images_every
        has_reader = self._tensorboard is not None or bool(self._trackers)
        return has_reader and every is not None and (step == 1 or step % every == 0)

    def images(self, step: int, make: Callable[[int], Sequence[CaptionedImage]]) -> None:
        """Write sample images if this step writes any. Only then ``make(limit)`` is called."""
        if not self.wants_images(step):
            return
        if images := make(self._config.num_images):
            self._send_images(step, images, "samples")

    def drawings(self, step: int, images: Sequence[CaptionedImage]) -> None:
        """Send the drawings of a step to TensorBoard and the trackers."""
        self._send_images(step, images, "drawings")

    def _send_images(self, step: int, images: Sequence[CaptionedImage], name: str) -> None:
        if self._tensorboard is not None:
            self._tensorboard.images(step, images, name)
        self._trackers.images(step, images, name)

    def print_line(self, text: str) -> None:
        """Print a line in addition to the progress line."""
        self._progress.print_line(text)

    def close(self) -> None:
        """Close every file and stop the progress bar."""
        self._progress.close()
        self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NullLog:
    """The log of every rank other than 0: the methods of ``RunLog`` without output.

    ``waiting_for_data`` still marks its range in a profiler trace.
    """

    def begin_stage(self, stage: LoggedStage) -> None:
        return None

    def waiting_for_data(self) -> AbstractContextManager[None]:
        return record_function("data")

    def pause(self, spent: Spent = "other") -> None:
        return None

    def step(
        self,
        step: int,
        report: StepReport,
        sums: Mapping[str, float],
        counters: Mapping[str, float] | None = None,
        *,
        hold: bool = False,
    ) -> None:
        return None

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        return None

    def scalars(self, step: int, what: str, values: Mapping[str, float]) -> None:
        return None

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        return None

    def wants_images(self, step: int) -> bool:
        return False

    def images(self, step: int, make: Callable[[int], Sequence[CaptionedImage]]) -> None:
        return None

    def drawings(self, step: int, images: Sequence[CaptionedImage]) -> None:
        return None

    def print_line(self, text: str) -> None:
        return None

    def close(self) -> None:
        return None


def open_run_log(
    run_dir: Path, config: MetricsConfig, start_step: int, total_steps: int, rank: int, trackers: Trackers | None = None
) -> RunLog | NullLog:
    """Return a ``RunLog`` on rank 0, and a ``NullLog`` on other ranks."""
    return RunLog(run_dir, config, start_step, total_steps, trackers=trackers) if rank == 0 else NullLog()


@dataclass(frozen=True)
class StepTiming:
    """The time of one step.

    Attributes:
        seconds: Wall time since the end of the previous step or pause, or since the meter was created.
        data_wait_seconds: The part of ``seconds`` spent waiting for the loader.
    """

    seconds: float
    data_wait_seconds: float


@dataclass(frozen=True)
class Rates:
    """Moving averages. ``data_wait_share`` is in [0, 1]; ``eta_seconds`` is 0 after the last step."""

    tokens_per_second: float
    samples_per_second: float
    data_wait_share: float
    eta_seconds: float


class StepMeter:
    """Measures the steps of one process.

    Rates are ratios of averages (tokens over seconds), not averages of ratios: a short step must not count as much as a
    long one. The averages are exponential, with a correction of the bias towards their initial value 0.

    Args:
        start_step: Finished steps.
        total_steps: Steps of the whole run.
        smoothing: Weight of the past in [0, 1).
        clock: Monotonic clock in seconds; replaced in tests.

    Source: Kingma and Ba 2015, "Adam", section 3 (initialisation bias correction).
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
        self._smoothing = smoothing
        self._last_end = clock()
        self._data_wait = 0.0
        self._totals, self._weight = [0.0] * 4, 0.0
        """Weighted sums over steps of seconds, waiting seconds, tokens and samples, and the sum of the weights."""

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the enclosed time as data wait of the current step."""
        start = self._clock()
        try:
            with record_function("data"):
                yield
        finally:
            self._data_wait += self._clock() - start

    def pause(self) -> None:
        """Restart the clock of the current step. The time since the last step then counts for no step."""
        self._last_end = self._clock()
        self._data_wait = 0.0

    def finish_step(self, num_tokens: float, num_samples: float) -> StepTiming:
        """End the current step and return its time. Tokens and samples are those of all ranks."""
        now = self._clock()
        timing = StepTiming(now - self._last_end, self._data_wait)
        self._last_end = now
        self._data_wait = 0.0
        self._step += 1
        past = self._smoothing
        values = (timing.seconds, timing.data_wait_seconds, num_tokens, num_samples)
        self._totals = [past * total + (1 - past) * value for total, value in zip(self._totals, values, strict=True)]
        self._weight = past * self._weight + (1 - past)
        return timing

    def rates(self) -> Rates:
        """Return the moving averages after the last finished step."""
        seconds, waited, tokens, samples = (total / self._weight if self._weight else 0.0 for total in self._totals)
        per_second = 1 / seconds if seconds > 0 else 0.0
        return Rates(
            tokens_per_second=tokens * per_second,
            samples_per_second=samples * per_second,
            data_wait_share=min(1.0, waited * per_second),
            eta_seconds=max(0, self._total_steps - self._step) * seconds,
        )


class ProgressLine:
    """Shows the progress of the run: a live bar on a terminal, else plain lines.

    Args:
        console: Where to print.
        start_step: Finished steps.
        total_steps: Steps of the whole run.
        plain_line_seconds: Seconds between two plain lines.
        clock: Monotonic clock in seconds; replaced in tests.
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
                TextColumn("{task.fields[rates]}"),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, rates="")
            self._bar.start()

    def is_due(self, step: int) -> bool:
        """Return whether to show a finished step: every step on a terminal; else at intervals, and the last step."""
        if self._bar is not None or self._last_line is None or step == self._total_steps:
            return True
        return self._clock() - self._last_line >= self._every

    def update(self, step: int, loss: float, rates: Rates, stage: str) -> None:
        """Show a finished step."""
        rates_text = (
            f"loss {loss:.4f} · {format_count(rates.tokens_per_second)} tokens/s · "
            f"{format_count(rates.samples_per_second)} samples/s · wait {100 * rates.data_wait_share:.0f}% · "
            f"ETA {format_seconds(rates.eta_seconds)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=stage, rates=rates_text)
        else:
            self._last_line = self._clock()
            self.print_line(f"{stage} · step {step}/{self._total_steps} · {rates_text}")

    def print_line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
