"""What a run writes down about itself while it trains."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.io.strict import StrictConfig


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
    grad_norms_every: int | None = Field(default=10, ge=1)
    """The gradient norm of each component every this many steps; costs a pass over the gradient. null for never."""
    memory_every: int | None = Field(default=10, ge=1)
    """The peak memory of forward, backward and optimizer apart every this many steps; null for never. The mark that the
    system keeps of the process is reset for that, so a tool that reads it from outside sees the last phase's."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Dense operations a second of one rank's device, for MFU. null: the published figure of a known GPU, and on a CPU
    what torch's own matrix product reaches."""
    profile_after_steps: int = Field(default=2, ge=1)
    """``--profile`` lets this many steps of a start pass before it records."""
    profile_steps: int = Field(default=3, ge=1)
    """Steps that ``--profile`` records; a step of a small model on a CPU takes some 10 MB."""
    plain_line_seconds: float = Field(default=10.0, gt=0, le=1e9)
    """Where the output is no terminal: seconds between two progress lines."""
    smoothing: float = Field(default=0.95, ge=0, lt=1)
    """Weight of the past in the moving averages that the progress line shows; 0 shows the last step alone."""
