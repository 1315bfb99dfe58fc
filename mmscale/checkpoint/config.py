"""When to save and what to keep."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.strict import StrictConfig


class CheckpointConfig(StrictConfig):
    """Checkpoints of a run. One is always written at the end of a stage and when the run is told to stop."""

    every_steps: int | None = Field(default=500, ge=1)
    """Save after every so many steps; None saves only at stage ends and when stopped."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for ever; None keeps none of the older ones."""

    def due(self, step: int) -> bool:
        """Whether to save after ``step`` steps of the run."""
        return self.every_steps is not None and step % self.every_steps == 0
