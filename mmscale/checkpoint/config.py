"""When to save and what to keep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from data_pipeline.io.strict import StrictConfig


class CheckpointConfig(StrictConfig):
    """Checkpoints of a run. One is always written at the end of a stage and when the run is told to stop."""

    every_steps: int | None = Field(default=500, ge=1)
    """Save after every so many steps; None saves only at stage ends and when stopped."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for ever; None keeps none of the older ones."""
    background: bool = True
    """Write in a process of its own while training goes on: a step then waits only for a copy in host memory, which
    is as large as the rank's share of weights and moments. False writes before the next step and needs no copy."""
    when_busy: Literal["wait", "skip"] = "wait"
    """If a save is due while the one before is still being written: ``wait`` for it, or ``skip`` the new one. At the
    end of a stage, and when the run is told to stop, it always waits."""
    on_damage: Literal["stop", "previous"] = "stop"
    """If the newest checkpoint is damaged: ``stop`` with its name and the reason, or rename it (``step-N.damaged``) and
    continue from the ``previous`` good one."""
