"""Configuration of packing: ``data.packing``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig


class PackingConfig(StrictConfig):
    """How documents are packed; one pack is one lane of one step."""

    max_tokens: int = Field(ge=1, lt=1 << 31)
    """Most tokens of a pack, its dummy document included. Bounds memory."""
    max_cost: float | None = Field(default=None, gt=0)
    """Largest cost of a pack: tokens plus alpha times patches, its dummy document included. Alpha, the time of a patch
    relative to a token, follows from the model. Bounds time; null: no limit."""
    max_documents: int | None = Field(default=None, ge=1)
    """Most documents of a pack, its dummy document not counted; null: no limit."""
    strategy: Literal["greedy", "first_fit", "best_fit"] = "best_fit"
    """Which waiting document is added to a pack next: the oldest, and the pack is closed if that does not fit
    (``greedy``); the oldest that fits (``first_fit``); the largest that fits (``best_fit``). The first document of a
    pack is always the oldest. If several parts of a split sample wait, ``greedy`` works as ``first_fit``."""
    look_ahead: int = Field(default=1, ge=1, le=256)
    """Number of documents that wait to be packed, among which the strategy chooses. The parts of a split sample all
    wait, so there can be more. With 1 and no split samples, every strategy is greedy."""
    too_long: Literal["error", "truncate", "split"] = "error"
    """Treatment of a document that no pack can hold, or that needs more positions than the model has: skip its sample
    as a bad one (``error``), cut off its end (``truncate``), or split it into several documents (``split``)."""

    @model_validator(mode="after")
    def _check_strategy(self) -> PackingConfig:
        if self.strategy == "greedy" and self.look_ahead > 1:
            raise ValueError(
                f"strategy: greedy looks at one document only; remove look_ahead={self.look_ahead}, "
                "or use first_fit or best_fit"
            )
        return self
