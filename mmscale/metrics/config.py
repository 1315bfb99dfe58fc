"""What a run writes down about itself while it trains."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.strict import StrictConfig


class MetricsConfig(StrictConfig):
    """The ``metrics`` block of a run. ``metrics.jsonl`` always has one line a step; the rest is set here."""

    log_every: int = Field(default=1, ge=1)
    """TensorBoard gets scalars every this many steps; at least 1."""
    tensorboard: bool = True
    """Write TensorBoard event files under ``RUN/tensorboard``."""
    images_every: int | None = Field(default=200, ge=1)
    """TensorBoard gets sample images with their captions every this many steps; null for never."""
    num_images: int = Field(default=6, ge=1, le=64)
    """Sample images each time."""
    plain_line_seconds: float = Field(default=10.0, gt=0)
    """Where the output is no terminal: seconds between two progress lines."""
    smoothing: float = Field(default=0.95, ge=0, lt=1)
    """Weight of the past in the moving averages that the progress line shows; 0 shows the last step alone."""
