"""The ranks that share a step, as an objective sees them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class WorldInfo(Protocol):
    """The ranks that share a step, and the device of this rank's model. ``mmscale.dist.World`` implements it."""

    @property
    def rank(self) -> int: ...
    @property
    def device(self) -> torch.device: ...

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of every rank, by rank. Ranks may have different numbers of rows. All ranks must call."""
        ...


class OneRank:
    """The only rank of a step, on the CPU."""

    rank, device = 0, torch.device("cpu")

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return ``[rows]``.

        Raises:
            ValueError: this process is one of several ranks.
        """
        if torch.distributed.is_initialized() and (ranks := torch.distributed.get_world_size()) > 1:
            raise ValueError(
                f"{ranks} ranks share a step, but the objective would use the rows of one: build it with "
                "world=, the result of mmscale.dist.init_distributed"
            )
        return [rows]
