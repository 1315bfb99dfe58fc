"""Measure how long steps take, and write each step: ``metrics.jsonl``, TensorBoard and the progress line.

    log = open_run_log(run_dir, config, start_step, total_steps, rank)
    log.begin_stage("align", ...)
    with log.waiting_for_data(): batch = next(batches)
    ...
    log.step(step, report, sums, counters)

Rank 0 writes; every other rank holds a ``NullLog`` with the same methods, so the loop has no rank in it. A terminal
gets a live bar, a log file a plain line now and then.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.profiler import record_function

from data_pipeline.io.untrusted import append_regular
from mmscale.engine.engine import StepReport
from mmscale.engine.step_clock import peak_memory
from mmscale.errors import MMScaleError
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.format import format_count, format_seconds
from mmscale.metrics.goodput import Spent, WallTime
from mmscale.metrics.metrics_file import cut_back
from mmscale.metrics.sample_images import CaptionedImage, with_caption
from mmscale.metrics.step_counts import step_metrics

UNSEEN_STEPS = 20
"""Steps of a stage without any image before the warning; a mixture with few images has one by then."""


@dataclass(frozen=True)
class LoggedStage:
    """The facts about a stage that its steps' lines need.

    Attributes:
        name: Of the stage.
        datasets: Names of its data sets.
        peak_flops: Operations a second of all devices; None where that is not known.
        expects_images: Whether its model has a vision tower. If so, and the first ``UNSEEN_STEPS`` steps hold no image,
            a warning is printed. ``check_files`` finds that before a run starts, but reads no streamed and remote data.
    """

    name: str
    datasets: Sequence[str] = ()
    peak_flops: float | None = None
    expects_images: bool = False


class RunLog:
    """Writes ``metrics.jsonl``, TensorBoard and the progress line of a run.

    Args:
        run_dir: The run folder; made if absent.
        config: The ``metrics`` block.
        start_step: Steps done before this process; later lines of an interrupted process are removed.
        total_steps: Step count at which the run ends.
        console: Where the progress line goes; standard error by default.
    """

    def __init__(
        self, run_dir: Path, config: MetricsConfig, start_step: int, total_steps: int, console: Console | None = None
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._meter = StepMeter(start_step, total_steps, config.smoothing)
        self._wall_time = WallTime(run_dir, start_step)  # Before the next line, which forgets steps.
        self._step, self._checkpoint_seconds = start_step, 0.0
        self._stage, self._unseen_steps_left = LoggedStage(""), 0
        self._jsonl = JsonlSink(run_dir / "metrics.jsonl", start_step)
        self._tensorboard = TensorBoardSink(run_dir / "tensorboard", start_step) if config.tensorboard else None
        self._progress = ProgressLine(
            console or Console(stderr=True), start_step, total_steps, config.plain_line_seconds
        )

    def begin_stage(self, stage: LoggedStage) -> None:
        """Call before the first step of a start and of each stage."""
        self._stage = stage
        self._unseen_steps_left = UNSEEN_STEPS if stage.expects_images else 0

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Counts the enclosed time as data wait of the present step."""
        return self._meter.waiting_for_data()

    def pause(self, spent: Spent = "other") -> None:
        """Call after work that is no step: its time counts for none, and in the goodput as ``spent``."""
        self._meter.pause()
        seconds = self._wall_time.spent(spent, self._step)
        if spent == "checkpoint":
            self._checkpoint_seconds += seconds

    def step(
        self, step: int, report: StepReport, sums: Mapping[str, float], counters: Mapping[str, int] | None = None
    ) -> None:
        """Write a finished step.

        Args:
            step: Number of steps done, from 1.
            report: Loss, norm and learning rates; ``lr`` of the line is the largest learning rate of any component.
            sums: ``count_step`` and ``step_flops`` of the step, summed over all ranks. ``mfu`` is the time that the
                model's operations would take at the devices' peak, over the time of the step.
            counters: Further numbers of the run so far, by name.
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
        self._jsonl.write({"step": step, "stage": self._stage.name, **metrics})
        if self._tensorboard is not None and step % self._config.log_every == 0:
            rate = {"tokens_per_second": num_tokens, "samples_per_second": num_samples}
            per_second = {name: count / max(timing.seconds, 1e-9) for name, count in rate.items()}
            self._tensorboard.scalars(step, {**metrics, **per_second})
        if self._progress.is_due(step):
            self._progress.update(step, report.loss, self._meter.rates(), self._stage.name)
        if self._unseen_steps_left:
            self._unseen_steps_left = 0 if sums["images"] else self._unseen_steps_left - 1
            if not self._unseen_steps_left and not sums["images"]:
                self.note(
                    f"warning: stage {self._stage.name}: the model has a vision tower, and its first {UNSEEN_STEPS} "
                    "steps held no image, so the tower and the connector learn nothing; check the data sets, or set "
                    "model.vision and model.connector to null"
                )

    def wants_images(self, step: int) -> bool:
        """Whether ``images`` should be called for this step."""
        every = self._config.images_every
        return self._tensorboard is not None and every is not None and (step == 1 or step % every == 0)

    def images(self, step: int, make: Callable[[int], Sequence[CaptionedImage]]) -> None:
        """Writes sample images; ``make(limit)`` is called here, only where and when they are written."""
        if self._tensorboard is not None and self.wants_images(step):
            self._tensorboard.images(step, make(self._config.num_images))

    def note(self, text: str) -> None:
        """Prints one line beside the progress line."""
        self._progress.note(text)

    def close(self) -> None:
        """Closes every file and gives the terminal back."""
        self._progress.close()
        self._jsonl.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NullLog:
    """The same methods, doing nothing: the log of every rank but 0."""

    def begin_stage(self, stage: LoggedStage) -> None:
        return None

    def waiting_for_data(self) -> AbstractContextManager[None]:
        return record_function("data")

    def pause(self, spent: Spent = "other") -> None:
        return None

    def step(
        self, step: int, report: StepReport, sums: Mapping[str, float], counters: Mapping[str, int] | None = None
    ) -> None:
        return None

    def wants_images(self, step: int) -> bool:
        return False

    def images(self, step: int, make: Callable[[int], Sequence[CaptionedImage]]) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        return None


def open_run_log(
    run_dir: Path, config: MetricsConfig, start_step: int, total_steps: int, rank: int
) -> RunLog | NullLog:
    """The log of this rank: a ``RunLog`` on rank 0, else a ``NullLog``."""
    return RunLog(run_dir, config, start_step, total_steps) if rank == 0 else NullLog()


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
    as a long one. The averages are exponential, without the pull towards their start at 0.

    Args:
        start_step: Steps done before this process started.
        total_steps: Step count at which the run ends.
        smoothing: Weight of the past in [0, 1).
        clock: Seconds, monotonic; replaced in tests.

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
        """Weighted sums of seconds, seconds of waiting, tokens and samples of the steps, and the sum of the weights."""

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

    def finish_step(self, num_tokens: float, num_samples: float) -> StepTiming:
        """Ends the present step, which handled so many tokens and samples over all ranks."""
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
        """The moving averages after the last finished step."""
        seconds, waited, tokens, samples = (total / self._weight if self._weight else 0.0 for total in self._totals)
        per_second = 1 / seconds if seconds > 0 else 0.0
        return Rates(
            tokens_per_second=tokens * per_second,
            samples_per_second=samples * per_second,
            data_wait_share=min(1.0, waited * per_second),
            eta_seconds=max(0, self._total_steps - self._step) * seconds,
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

    def is_due(self, step: int) -> bool:
        """Return whether a finished step is shown: each step on a terminal, else now and then and the last step."""
        if self._bar is not None or self._last_line is None or step == self._total_steps:
            return True
        return self._clock() - self._last_line >= self._every

    def update(self, step: int, loss: float, rates: Rates, stage: str) -> None:
        """Shows a finished step."""
        figures = (
            f"loss {loss:.4f} · {format_count(rates.tokens_per_second)} tokens/s · "
            f"{format_count(rates.samples_per_second)} samples/s · wait {100 * rates.data_wait_share:.0f}% · "
            f"ETA {format_seconds(rates.eta_seconds)}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=stage, figures=figures)
        else:
            self._last_line = self._clock()
            self.note(f"{stage} · step {step}/{self._total_steps} · {figures}")

    def note(self, text: str) -> None:
        """Prints one line of its own, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()


class JsonlSink:
    """Writes ``metrics.jsonl``: one line a step, flushed at once. On construction it is cut back to ``start_step``.

    Args:
        path: The file; its folder must exist.
        start_step: Steps that are done and stay; 0 for a new run.

    Raises:
        MMScaleError: the file cannot be read or written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        cut_back(path, start_step)
        try:
            self._file = append_regular(path)
        except OSError as error:
            raise MMScaleError(f"{path}: cannot be written: {error.strerror}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:  # JSON has no NaN or infinity.
            line = json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False)
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by null, so that the line stays readable by every parser."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return value


class TensorBoardSink:
    """Scalars and captioned images as TensorBoard event files.

    Args:
        folder: ``RUN/tensorboard``.
        start_step: Events of later steps, left by a killed process, are hidden by TensorBoard from now on.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Slow to import: only when asked for.

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each named curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, images: Sequence[CaptionedImage]) -> None:
        """Adds the images, each with its caption drawn under it, and a table of the captions in full."""
        for number, image in enumerate(images):
            self._writer.add_image(f"samples/{number}", with_caption(image), step, dataformats="HWC")
        rows = [f"| {number} | {_cell(image.caption)} |" for number, image in enumerate(images)]
        self._writer.add_text("samples/captions", "\n".join(["| image | caption |", "|---|---|", *rows]), step)

    def close(self) -> None:
        """Writes what is queued and closes the file."""
        self._writer.close()


def _cell(text: str) -> str:
    """Text as the content of a Markdown table cell."""
    escaped = "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~" else mark for mark in text)
    return " ".join(escaped.split())
