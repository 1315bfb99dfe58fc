"""Which samples each step was fed: the rows of all ranks, brought together and written by rank 0.

    step --Recorder (each rank)--> every N steps and before each checkpoint: gather --> RUN/ledger/steps-A-B.ledger

Between two of these, rows wait in memory: a run that is killed does those steps again and writes them down then. Not
for: the file itself (``data_pipeline.history.sample_log``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_pipeline.history.sample_log import COLUMNS, Segment, cut_back, write_segment
from data_pipeline.io.strict import StrictConfig
from data_pipeline.loader.loader import StepBatch
from data_pipeline.order.state import LoaderState
from mmscale.dist import World, gather_bytes, raise_on_any_rank
from mmscale.errors import MMScaleError
from mmscale.metrics.step_counts import MeasuredDocument


class LedgerConfig(StrictConfig):
    """The ``ledger`` block of a run: what ``mmscale data trace`` reads. It is always kept."""

    every_steps: int = Field(default=256, ge=1)
    """Rows are brought together and written every this many steps (and with each checkpoint), with a snapshot of the
    loader's integers; a sample's future step is replayed from there."""
    losses: bool = True
    """Keep the loss of every document: four bytes each."""


@dataclass
class Recorder:
    """Rows of one rank, held until they are taken as a segment.

    Args:
        step: Steps done before.
        stage: Index of the stage.
        losses: Whether losses are kept.

    Attributes:
        num_steps: Steps that are held.
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

    def add(self, batch: StepBatch, documents: Sequence[MeasuredDocument]) -> None:
        """Record the next step.

        Args:
            batch: This rank's part of the step.
            documents: ``measured_documents`` of it.
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

    def take(self) -> Segment:
        """The steps since the last call; there must be one."""
        assert self._state is not None, "no step was added"
        columns = list(zip(*self._rows, strict=True)) or [()] * len(COLUMNS)
        rows = {name: np.array(c, kind) for c, (name, kind) in zip(columns, COLUMNS.items(), strict=True)}
        segment = Segment(self._first, self.step, self.stage, self._state, rows, tuple(self._skipped))
        self._first, self.num_steps = self.step + 1, 0
        self._rows, self._skipped, self._state = [], [], None
        return segment


class RunLedger:
    """Writes the ledger of a run, stage by stage.

    Args:
        folder: ``RUN/ledger``, seen by rank 0.
        config: The ``ledger`` block.
        world: This rank.
        step: Steps done; what lies behind them is removed, since it is done again.

    Raises:
        MMScaleError: rank 0 cannot change the folder; every rank raises.
    """

    def __init__(self, folder: Path, config: LedgerConfig, world: World, step: int) -> None:
        self._folder, self._config, self._world = folder, config, world
        self._recorder = Recorder(step, 0, config.losses)
        self._together(lambda: cut_back(folder, step))

    def begin_stage(self, step: int, stage: int) -> None:
        """The steps after ``step`` belong to ``stage``; whatever came before is written."""
        assert not self._recorder.num_steps, "a stage ends with a checkpoint"
        self._recorder = Recorder(step, stage, self._config.losses)

    def step(self, batch: StepBatch, documents: Sequence[MeasuredDocument]) -> None:
        """Record a step. Every ``every_steps`` steps also write. All ranks must call.

        Args:
            batch: This rank's part of the step.
            documents: ``measured_documents`` of it.

        Raises:
            MMScaleError: rank 0 cannot write; every rank raises.
        """
        self._recorder.add(batch, documents)
        if self._recorder.num_steps >= self._config.every_steps:
            self.write()

    def write(self) -> None:
        """Writes what is held, if anything. All ranks must call.

        Raises:
            MMScaleError: rank 0 cannot write; every rank raises.
        """
        if not self._recorder.num_steps:
            return
        parts = gather_bytes(self._world, self._recorder.take().to_bytes())
        self._together(lambda: write_segment(self._folder, Segment.merge([Segment.from_bytes(p) for p in parts])))

    def _together(self, work: Callable[[], object]) -> None:
        complaint = None
        if self._world.is_main:
            try:
                work()
            except OSError as error:
                complaint = f"the ledger cannot be written: {error.filename or self._folder}: {error.strerror}"
        raise_on_any_rank(self._world, complaint, MMScaleError)
