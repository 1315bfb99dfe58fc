"""What an objective knows about the ranks that share a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

GatherRows = Callable[[Tensor], list[Tensor]]
"""Returns the rows of every rank, by rank. Ranks may have different numbers of rows. All ranks must call."""


@runtime_checkable
class WorldInfo(Protocol):
    """The ranks that share a step, and the device of this rank's model. ``mmscale.dist.World`` implements it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def gather_one_rank(rows: Tensor) -> list[Tensor]:
    """Return the rows of the only rank."""
    return [rows]
