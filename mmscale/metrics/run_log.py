"""The one object that the step loop talks to about figures.

    log = open_run_log(run_dir, config, start_step, total_steps, rank)
    with log.waiting_for_data(): batch = next(batches)
    ...
    log.step(step, report, num_tokens=..., num_samples=..., stage="align")

Rank 0 writes; every other rank holds a ``NullLog`` with the same methods, so the loop has no rank in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch.profiler import record_function

from mmscale.engine.peak_memory import peak_memory
from mmscale.metrics.config import MetricsConfig
from mmscale.metrics.goodput import Spent, WallTime
from mmscale.metrics.meters import StepMeter
from mmscale.metrics.progress import ProgressLine
from mmscale.metrics.sample_images import CaptionedImage
from mmscale.metrics.sinks import JsonlSink, TensorBoardSink


class StepFigures(Protocol):
    """What a step reports (``engine.StepReport`` has this shape)."""

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def learning_rates(self) -> Mapping[str, float]: ...
    @property
    def applied(self) -> bool: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


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
        self._jsonl = JsonlSink(run_dir / "metrics.jsonl", start_step)
        self._tensorboard = TensorBoardSink(run_dir / "tensorboard", start_step) if config.tensorboard else None
        self._progress = ProgressLine(
            console or Console(stderr=True), start_step, total_steps, config.plain_line_seconds
        )

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
        self,
        step: int,
        report: StepFigures,
        *,
        num_tokens: int,
        num_samples: int,
        stage: str,
        ideal_seconds: float | None = None,
        extra: Mapping[str, float | int] | None = None,
    ) -> None:
        """Writes down a finished step.

        Args:
            step: Number of steps done, from 1.
            report: Loss, norm and learning rates; ``lr`` of the line is the largest learning rate of any component.
            num_tokens: Tokens of this step over all ranks.
            num_samples: Samples of this step over all ranks.
            stage: Name of the stage.
            ideal_seconds: What the model's operations would take at the devices' peak; ``mfu`` is this over the step.
            extra: Further figures under names of their own.
        """
        timing = self._meter.finish_step(num_tokens, num_samples)
        rates = self._meter.rates()
        figures: dict[str, Any] = {
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
            **({"mfu": ideal_seconds / timing.seconds} if ideal_seconds is not None and timing.seconds else {}),
            **(extra or {}),
            **self._wall_time.step(timing.seconds, timing.data_wait_seconds),
        }
        self._step, self._checkpoint_seconds = step, 0.0
        self._jsonl.write({"step": step, "stage": stage, **figures})
        if self._tensorboard is not None and step % self._config.log_every == 0:
            rate = {"tokens_per_second": num_tokens, "samples_per_second": num_samples}
            per_second = {name: count / max(timing.seconds, 1e-9) for name, count in rate.items()}
            self._tensorboard.scalars(step, {**figures, **per_second})
        self._progress.update(step, report.loss, rates, stage)

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

    def waiting_for_data(self) -> AbstractContextManager[None]:
        return record_function("data")

    def pause(self, spent: Spent = "other") -> None:
        return None

    def step(
        self,
        step: int,
        report: StepFigures,
        *,
        num_tokens: int,
        num_samples: int,
        stage: str,
        ideal_seconds: float | None = None,
        extra: Mapping[str, float | int] | None = None,
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
