"""Configuration of packing: ``data.packing``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig


class PackingConfig(StrictConfig):
    """What goes into one lane of one step."""

    max_tokens: int = Field(ge=1, lt=1 << 31)
    """Tokens of a pack at most, null documents included (memory)."""
    max_cost: float | None = Field(default=None, gt=0)
    """Tokens plus alpha times patches of a pack at most (time), alpha from the model; None leaves it open."""
    max_documents: int | None = Field(default=None, ge=1)
    """Samples of a pack at most; None leaves it open."""
    strategy: Literal["greedy", "first_fit", "best_fit"] = "best_fit"
    """Which of the waiting documents goes next into a pack: the one that waits longest, and a pack closes when that
    does not fit (``greedy``); the first that fits (``first_fit``); the one that fills it best (``best_fit``)."""
    look_ahead: int = Field(default=1, ge=1, le=256)
    """Documents held to find one that fits the room left; 1 makes every strategy greedy."""
    too_long: Literal["error", "truncate", "split"] = "error"
    """A document that no pack can hold, or that has more tokens than the model has positions, is a bad sample, loses
    its end, or becomes several documents."""

    @model_validator(mode="after")
    def _check_strategy(self) -> PackingConfig:
        if self.strategy == "greedy" and self.look_ahead > 1:
            raise ValueError(
                f"strategy: greedy looks at one document only; leave look_ahead={self.look_ahead} out, "
                "or take first_fit or best_fit"
            )
        return self
