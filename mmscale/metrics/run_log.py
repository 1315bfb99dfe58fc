"""Write what a step measured: ``metrics.jsonl``, TensorBoard and the progress line.

    log = open_run_log(run_dir, config, start_step, total_steps, rank)
    log.begin_stage("align", ...)
    with log.waiting_for_data(): batch = next(batches)
    ...
    log.step(step, report, sums, counters)

Rank 0 writes; every other rank holds a ``NullLog`` with the same methods, so the loop has no rank in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.profiler import record_function

from mmscale.engine.engine import StepReport
from mmscale.engine.step_clock import peak_memory
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.goodput import Spent, WallTime
from mmscale.metrics.progress import ProgressLine, StepMeter
from mmscale.metrics.sample_images import CaptionedImage
from mmscale.metrics.sinks import JsonlSink, TensorBoardSink
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
