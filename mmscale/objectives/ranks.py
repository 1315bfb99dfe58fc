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


def gather_or_one_rank(world: WorldInfo | None, gather: GatherRows | None) -> GatherRows:
    """Return ``gather``, or without it a function that returns the rows of the only rank.

    Raises:
        ValueError: there are several ranks, but no ``gather``.
    """
    if gather is not None:
        return gather
    if world is not None and world.world_size > 1:
        raise ValueError(f"{world.world_size} ranks share a step: pass gather, a function that gathers their rows")
    return lambda rows: [rows]
