"""Configuration of the sample order: ``data.order``."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.io.strict import StrictConfig


class OrderConfig(StrictConfig):
    """Shuffling in two stages: blocks of samples are permuted, then the samples of a window of blocks."""

    block_size: int = Field(default=16, ge=1, le=1 << 20)
    """Number of consecutive samples in a block. Larger blocks are read more sequentially; smaller blocks shuffle
    better."""
    window_blocks: int = Field(default=8, ge=1, le=1 << 20)
    """Number of consecutive blocks of a lane that form a window, inside which samples are permuted."""
