"""Which samples each step was fed: the rows of all ranks, brought together and written by rank 0.

    step --Recorder (each rank)--> every N steps and before each checkpoint: gather --> RUN/ledger/steps-A-B.ledger

Between two of these, rows wait in memory: a run that is killed does those steps again and writes them down then. Not
for: the file itself (``data_pipeline.history.sample_log``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from data_pipeline.history.sample_log import Recorder, Segment, cut_back, write_segment
from data_pipeline.io.strict import StrictConfig
from data_pipeline.loader.loader import StepBatch
from mmscale.dist import World, gather_bytes, raise_on_any_rank
from mmscale.errors import MMScaleError


class LedgerConfig(StrictConfig):
    """The ``ledger`` block of a run: what ``mmscale data trace`` reads. It is always kept."""

    every_steps: int = Field(default=256, ge=1)
    """Rows are brought together and written every this many steps (and with each checkpoint), with a snapshot of the
    loader's integers; a sample's future step is replayed from there."""
    losses: bool = True
    """Keep the loss of every document: four bytes each."""


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

    def step(self, batch: StepBatch, losses: tuple[tuple[float, ...], ...]) -> None:
        """Takes down a step, and writes when it is time. All ranks must call.

        Args:
            batch: What this rank was fed.
            losses: ``StepReport.document_losses``.

        Raises:
            MMScaleError: rank 0 cannot write; every rank raises.
        """
        self._recorder.add(batch, losses)
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
