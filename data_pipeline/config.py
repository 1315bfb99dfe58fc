"""Configuration of the data side: the ``data`` block of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.faults import FaultConfig
from data_pipeline.strict import StrictConfig
from data_pipeline.template import CaptionTemplate, TemplateConfig
from data_pipeline.tokenizer import TokenizerConfig
from data_pipeline.transforms import FixedTransform, TransformConfig


class DatasetConfig(StrictConfig):
    """One data set of the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Unique name of letters, digits, ``_.-``; a part of the seed of its order and its augmentation."""
    manifest: Path
    """Manifest written by ``mmscale data ingest`` or ``index``; relative to the working directory."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the draws, relative to the other data sets."""
    template: TemplateConfig = CaptionTemplate()
    """Which text is read and which is learned."""
    transforms: TransformConfig = FixedTransform()
    """How an image becomes views."""


class OrderConfig(StrictConfig):
    """Shuffling: blocks are permuted, and samples inside a window of blocks."""

    block_size: int = Field(default=16, ge=1)
    """Consecutive samples of a block: larger reads more sequentially, smaller shuffles better."""
    window_blocks: int = Field(default=8, ge=1)
    """Blocks of a lane whose samples are mixed."""


class PackingConfig(StrictConfig):
    """What goes into one lane of one step."""

    max_tokens: int = Field(ge=1)
    """Tokens of a pack at most, null documents included (memory)."""
    max_cost: float | None = Field(default=None, gt=0)
    """Tokens plus alpha times patches of a pack at most (time), alpha from the model; None leaves it open."""
    max_documents: int | None = Field(default=None, ge=1)
    """Samples of a pack at most; None leaves it open."""
    look_ahead: int = Field(default=1, ge=1, le=256)
    """Documents held to find one that fits the room left; 1 closes a pack at the first that does not fit."""
    too_long: Literal["error", "truncate"] = "error"
    """A document that no pack can hold is a bad sample, or loses its end."""


class DataConfig(StrictConfig):
    """Everything that decides what the model is fed."""

    tokenizer: TokenizerConfig
    """Text to ids."""
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    """The mixture."""
    lanes: int = Field(ge=1)
    """Rows of the global batch: each holds one pack a step, whatever the number of ranks."""
    packing: PackingConfig
    """Budgets of a pack."""
    order: OrderConfig = OrderConfig()
    """Shuffling."""
    workers: int = Field(default=0, ge=0)
    """Worker processes of each rank, never more than its lanes; 0 loads between steps. Never changes the order."""
    prefetch: int = Field(default=2, ge=1)
    """Steps that each worker is ahead. Never changes the order."""
    faults: FaultConfig = FaultConfig()
    """What happens to bad samples."""

    @model_validator(mode="after")
    def _check_names(self) -> DataConfig:
        names = [dataset.name for dataset in self.datasets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data set names must differ; used twice: {', '.join(twice)}")
        return self
