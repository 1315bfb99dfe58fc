"""The ``metrics`` block of a run."""

from __future__ import annotations

from pydantic import Field, field_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.metrics.trackers.config import TrackerConfig


class MetricsConfig(StrictConfig):
    """The metrics that a run writes. ``metrics.jsonl`` always gets one line a step; this block sets the rest."""

    log_every: int = Field(default=1, ge=1)
    """Write scalars to TensorBoard every this many steps; at least 1."""
    tensorboard: bool = True
    """Write TensorBoard event files under ``RUN/tensorboard``."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Experiment trackers that get the same values as TensorBoard: ``wandb``, ``mlflow``, ``trackio``, or blocks of
    settings; at most one of each kind."""
    images_every: int | None = Field(default=200, ge=1)
    """Write sample images with their captions to TensorBoard and the trackers every this many steps, and at step 1;
    null for never."""
    num_images: int = Field(default=6, ge=1, le=64)
    """Number of sample images, 1 to 64."""
    grad_norms_every: int | None = Field(default=10, ge=1)
    """Compute the gradient norm of each component every this many steps, at the cost of a pass over the gradient; null
    for never."""
    memory_every: int | None = Field(default=10, ge=1)
    """Measure the peak memory of forward, backward and optimizer separately every this many steps; null for never. This
    resets the system's high-water mark of the process, so another tool that reads it sees the last phase only."""
    router_every: int | None = Field(default=20, ge=1)
    """Sum the loads of experts over this many steps, then write their balance to the metrics and the loads to
    ``RUN/router.json``; null for never. In a window that is too short, experts have no token by chance."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Peak dense floating-point operations per second of one rank's device, for MFU. null: the published value of a
    known GPU; on a CPU the measured speed of a torch matrix product."""
    profile_after_steps: int = Field(default=2, ge=1)
    """Steps of a start before ``--profile`` begins to record; at least 1."""
    profile_steps: int = Field(default=3, ge=1)
    """Steps that ``--profile`` records; at least 1. A step of a small model on a CPU takes about 10 MB."""
    plain_line_seconds: float = Field(default=10.0, gt=0, le=1e9)
    """Seconds between two progress lines if the output is not a terminal; above 0."""
    smoothing: float = Field(default=0.95, ge=0, lt=1)
    """Weight of the past in the moving averages of the progress line, from 0 to below 1; 0 shows only the last step."""

    @field_validator("trackers")
    @classmethod
    def _check_kinds(cls, trackers: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        kinds = [tracker.kind for tracker in trackers]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"one tracker of each kind, got {kinds}")
        return trackers
