"""Configuration of the order of samples: ``data.order``."""

from __future__ import annotations

from pydantic import Field

from data_pipeline.io.strict import StrictConfig


class OrderConfig(StrictConfig):
    """Shuffling: blocks are permuted, and samples inside a window of blocks."""

    block_size: int = Field(default=16, ge=1, le=1 << 20)
    """Consecutive samples of a block: larger reads more sequentially, smaller shuffles better."""
    window_blocks: int = Field(default=8, ge=1, le=1 << 20)
    """Blocks of a lane whose samples are mixed."""
