"""Record which samples each step trains on. Rank 0 gathers the rows of all ranks and writes them.

    step --StepRecorder (each rank)--> every N steps and before each checkpoint: gather
         --> RUN/sample_log/steps-A-B.samples

Rows stay in memory until they are gathered. A killed run loses them, and records them when it repeats those steps. Not
for: the file format (``data_pipeline.history.sample_log``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_pipeline.history.sample_log import COLUMNS, LogSegment, cut_back, write_segment
from data_pipeline.io.retry import explain_io
from data_pipeline.io.strict import StrictConfig
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.state import LoaderState
from mmscale.dist import World, gather_bytes, raise_on_any_rank
from mmscale.errors import MMScaleError
from mmscale.metrics.step_counts import DocumentStats


class SampleLogConfig(StrictConfig):
    """The ``sample_log`` block of a run. Every run writes a sample log; ``mmscale data trace`` reads it."""

    every_steps: int = Field(default=256, ge=1)
    """Steps per file, at least 1; a checkpoint ends a file earlier. Each file contains the loader's state, from which
    later steps are replayed."""
    losses: bool = True
    """Whether to record the loss of every document, four bytes each before compression."""


@dataclass
class StepRecorder:
    """The rows of one rank since the last segment.

    Args:
        step: Finished steps.
        stage: Index of the stage.
        losses: Whether to record losses.

    Attributes:
        num_steps: Number of recorded steps since the last segment.
    """

    step: int
    stage: int
    losses: bool = True
    num_steps: int = field(default=0, init=False)
    _rows: list[tuple[float, ...]] = field(default_factory=list, init=False)
    _skipped: list[dict[str, Any]] = field(default_factory=list, init=False)
    _first: int = field(default=0, init=False)
    _state: LoaderState | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._first = self.step + 1

    def add(self, batch: StepBatch, documents: Sequence[DocumentStats]) -> None:
        """Record the next step.

        Args:
            batch: This rank's part of the step.
            documents: ``document_stats`` of it.
        """
        self.step += 1
        self.num_steps += 1
        places = [(lane, drawn) for lane, pack in batch.drawn.items() for drawn in pack]
        for (lane, drawn), document in zip(places, documents, strict=True):
            loss = math.nan
            if self.losses and document.loss_sum is not None and document.weight:
                loss = document.loss_sum / document.weight
            self._rows.append((self.step - self._first, lane, *drawn, document.tokens, loss))
        self._skipped += [{"step": self.step, **skip.record()} for skip in batch.skipped]
        self._state = batch.state

    def pop_segment(self) -> LogSegment:
        """Return the steps since the last call and forget them. At least one step must have been added."""
        assert self._state is not None, "no step was added"
        columns = list(zip(*self._rows, strict=True)) or [()] * len(COLUMNS)
        rows = {name: np.array(c, kind) for c, (name, kind) in zip(columns, COLUMNS.items(), strict=True)}
        segment = LogSegment(self._first, self.step, self.stage, self._state, rows, tuple(self._skipped))
        self._first, self.num_steps = self.step + 1, 0
        self._rows, self._skipped, self._state = [], [], None
        return segment


class RunSampleLog:
    """Writes the sample log of a run. All ranks must create one.

    Args:
        folder: ``RUN/sample_log``; only rank 0 writes there.
        config: The ``sample_log`` block.
        world: This rank.
        step: Finished steps. Rows of later steps are removed, since those steps are repeated.

    Raises:
        MMScaleError: rank 0 cannot change the folder; every rank raises.
    """

    def __init__(self, folder: Path, config: SampleLogConfig, world: World, step: int) -> None:
        self._folder, self._config, self._world = folder, config, world
        self._recorder = StepRecorder(step, 0, config.losses)
        self._run_on_rank_0(lambda: cut_back(folder, step))

    def begin_stage(self, step: int, stage: int) -> None:
        """Begin a stage with the step after ``step``. All earlier steps must have been written."""
        assert not self._recorder.num_steps, "a stage ends with a checkpoint"
        self._recorder = StepRecorder(step, stage, self._config.losses)

    def step(self, batch: StepBatch, documents: Sequence[DocumentStats]) -> None:
        """Record a step. Every ``every_steps`` steps also write. All ranks must call.

        Args:
            batch: This rank's part of the step.
            documents: ``document_stats`` of it.

        Raises:
            MMScaleError: rank 0 cannot write; every rank raises.
        """
        self._recorder.add(batch, documents)
        if self._recorder.num_steps >= self._config.every_steps:
            self.write()

    def write(self) -> None:
        """Write the recorded steps, if any. All ranks must call.

        Raises:
            MMScaleError: rank 0 cannot write; every rank raises.
        """
        if not self._recorder.num_steps:
            return
        parts = gather_bytes(self._world, self._recorder.pop_segment().to_bytes())
        self._run_on_rank_0(
            lambda: write_segment(self._folder, LogSegment.merge([LogSegment.from_bytes(p) for p in parts]))
        )

    def _run_on_rank_0(self, work: Callable[[], object]) -> None:
        """Run ``work`` on rank 0. If the disk fails, raise MMScaleError on all ranks."""
        message = None
        if self._world.is_main:
            try:
                work()
            except OSError as error:
                message = f"the sample log cannot be written: {error.filename or self._folder}: {explain_io(error)}"
        raise_on_any_rank(self._world, message, MMScaleError)
