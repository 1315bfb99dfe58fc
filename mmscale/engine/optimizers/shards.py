"""What an optimizer must know of the flat tensors that ZeRO lets it step.

    parameter A (flattened)  |=======|===========|        rank 0 holds the left part, rank 1 the right
    flat master of rank 1    [ ... A's part | B's part | padding ]

AdamW needs none of this: it treats every value alike. Adafactor and Muon look at rows, columns and matrices.
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
class Piece:
    """This rank's part of one parameter inside a flat master; empty where another rank holds all of it.

    Attributes:
        name: Name of the parameter in the model.
        shape: Of the whole parameter.
        offset: First value of the part, in the flat master.
        start: The same value's index in the flattened parameter.
        stop: One past the last.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int

    def of(self, flat: Tensor, start: int | None = None, stop: int | None = None) -> Tensor:
        """View of the part, or of ``[start, stop)`` of the parameter within it, in a tensor like the flat master."""
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
    """A tensor that the optimizer steps.

    Attributes:
        values: float32 masters; the optimizer's state is keyed by it.
        group: Its parameter group.
        pieces: A part of each parameter of the group, in the same order on every rank.
        shared_out: Whether the ranks hold different parts; else each holds the whole.
    """

    values: Tensor
    group: dict[str, Any]
    pieces: tuple[Piece, ...]
    shared_out: bool


class Exchange:
    """Collectives between the ranks that share out a flat master. All ranks must call each, in the same order.

    Args:
        master: The flat master.
        world: This rank. Messages travel on its device, wherever the masters are (offload).
    """

    def __init__(self, master: FlatMaster, world: World) -> None:
        self.alone = world.world_size == 1 or not master.shared_out
        self.world_size = 1 if self.alone else world.world_size
        self.rank = 0 if self.alone else world.rank
        self.device = world.device
        self.ranges = self._gather_ranges(master.pieces)

    def _gather_ranges(self, pieces: Sequence[Piece]) -> list[list[tuple[int, int]]]:
        """By rank, by piece: the range of the parameter that the rank holds."""
        mine = torch.tensor([[piece.start, piece.stop] for piece in pieces], dtype=torch.int64, device=self.device)
        theirs = [mine]
        if not self.alone:
            theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
            torch.distributed.all_gather(theirs, mine)
        return [[(low, high) for low, high in table.tolist()] for table in theirs]

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on every rank."""
        if self.alone:
            return values
        message = values.to(self.device)
        torch.distributed.all_reduce(message)
        return message.to(values.device)

    def deal(self, values: Tensor, give: list[int], take: list[int]) -> Tensor:
        """Sends ``give[r]`` of ``values`` to rank r, consecutively, and returns what comes, ``take[r]`` from rank r."""
        message = values.to(self.device)
        if self.alone:
            return message
        received = torch.empty(sum(take), dtype=values.dtype, device=self.device)
        torch.distributed.all_to_all_single(received, message, take, give)
        return received


def matrices(pieces: Sequence[Piece]) -> list[tuple[int, int, int]]:
    """Every matrix of the parameters as (index of the piece, first value, one past the last); experts one by one."""
    found: list[tuple[int, int, int]] = []
    for index, piece in enumerate(pieces):
        size = piece.rows * piece.columns
        found.extend((index, low, low + size) for low in range(0, math.prod(piece.shape), size))
    return found


def overlap(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """Common part of two ranges; of length 0 if there is none."""
    low = max(first[0], second[0])
    return low, max(low, min(first[1], second[1]))
