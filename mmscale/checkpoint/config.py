"""Configuration of checkpoints: when to save, and how many checkpoints to keep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.io.strict import StrictConfig


class CheckpointConfig(StrictConfig):
    """Checkpoints of a run. A run always saves at the end of each stage and when it receives a stop request."""

    every_steps: int | None = Field(default=500, ge=1)
    """Save when the run's step is a multiple of this number. null saves only at the end of a stage and on a stop
    request."""
    keep_last: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep. Each save removes older ones, except those that ``keep_every`` keeps."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep every checkpoint whose step is a multiple of this number. null keeps only the newest (``keep_last``)."""
    background: bool = True
    """true: a separate process writes the checkpoint while training continues, and the step waits only for a copy to
    host memory. The copy is as large as the rank's share of all weights and of the optimizer state; 8-bit state is
    copied as fp32. false: write before the next step, without the copy."""
    when_busy: Literal["wait", "skip"] = "wait"
    """Action if a save is due while the previous one is still being written: ``wait`` for it, or ``skip`` the new save.
    The save at the end of a stage, or on a stop request, always waits."""
    on_damage: Literal["stop", "previous"] = "stop"
    """Action if the newest checkpoint is damaged: ``stop`` with its name and the reason, or rename it to
    ``step-N.damaged`` and resume from the ``previous`` good one."""
