"""The parameters inside the flat tensors that ZeRO gives to an optimizer, and collectives over their shards.

    parameter A (flattened)  |=======|===========|        rank 0 holds the left shard, rank 1 the right one
    flat master of rank 1    [ ... shard of A | shard of B | padding ]

``torch.optim.AdamW`` does not need this, since it treats every value alike. Adafactor and Muon need rows, columns and
matrices, and 8-bit moments need the range of each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World


@dataclass(frozen=True)
class ParameterShard:
    """This rank's part of one parameter inside a flat master; empty if this rank holds no value of the parameter.

    Attributes:
        name: Name of the parameter in the model.
        shape: Shape of the whole parameter.
        offset: Index of the shard's first value in the flat master.
        start: Index of the same value in the flattened parameter.
        stop: Index after the last value in the flattened parameter.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int

    def view_of(self, flat: Tensor, start: int | None = None, stop: int | None = None) -> Tensor:
        """Return the view of this shard in a tensor like the flat master.

        ``start`` and ``stop`` limit the view to a range of the flattened parameter, which must be inside the shard.
        """
        low = self.start if start is None else start
        high = self.stop if stop is None else stop
        return flat.view(-1)[self.offset + low - self.start : self.offset + high - self.start]

    @property
    def rows(self) -> int:
        """Length of the second last dimension."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """Length of the last dimension."""
        return self.shape[-1]


@dataclass(frozen=True)
class FlatMaster:
    """A flat tensor that the optimizer steps.

    Attributes:
        values: float32 masters. The optimizer's state is keyed by this tensor.
        group: Its parameter group.
        shards: This rank's shard of each parameter in the tensor, in the same order on every rank.
        is_sharded: Whether the ranks hold different shards. If not, each rank holds whole parameters.
    """

    values: Tensor
    group: dict[str, Any]
    shards: tuple[ParameterShard, ...]
    is_sharded: bool


class Exchange:
    """Collectives over the shards of a flat master. All ranks must create it and call each method in the same order.

    Args:
        master: The flat master.
        world: This rank. Messages are sent from its device, also if the masters are offloaded.
    """

    def __init__(self, master: FlatMaster, world: World) -> None:
        self.alone = world.world_size == 1 or not master.is_sharded
        self.world_size = 1 if self.alone else world.world_size
        self.rank = 0 if self.alone else world.rank
        self.device = world.device
        self.ranges = self._gather_ranges(master.shards)

    def _gather_ranges(self, shards: Sequence[ParameterShard]) -> list[list[tuple[int, int]]]:
        """Return for each rank and shard the range of the parameter that the rank holds."""
        mine = torch.tensor([[shard.start, shard.stop] for shard in shards], dtype=torch.int64, device=self.device)
        theirs = [mine]
        if not self.alone:
            theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
            torch.distributed.all_gather(theirs, mine)
        return [[(low, high) for low, high in table.tolist()] for table in theirs]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, bitwise equal on every rank."""
        if self.alone:
            return values
        message = values.to(self.device)
        torch.distributed.all_reduce(message)
        return message.to(values.device)

    def all_to_all(self, values: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Send the next ``send_counts[r]`` of ``values`` to each rank r. Return the values received, in rank order."""
        message = values.to(self.device)
        if self.alone:
            return message
        received = torch.empty(sum(receive_counts), dtype=values.dtype, device=self.device)
        torch.distributed.all_to_all_single(received, message, receive_counts, send_counts)
        return received


def matrices(shards: Sequence[ParameterShard]) -> list[tuple[int, int, int]]:
    """Return every matrix as (index of the shard, first value, end) in the flattened parameter.

    A stack of experts counts as one matrix for each expert.
    """
    found: list[tuple[int, int, int]] = []
    for index, shard in enumerate(shards):
        size = shard.rows * shard.columns
        found.extend((index, low, low + size) for low in range(0, math.prod(shard.shape), size))
    return found


def overlap(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """Return the intersection of two ranges, of length 0 if they are disjoint."""
    low = max(first[0], second[0])
    return low, max(low, min(first[1], second[1]))
