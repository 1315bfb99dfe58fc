"""Adafactor on ZeRO's shards, with the numbers of ``torch.optim.Adafactor`` on whole parameters.

    each rank: sums of squared gradients over the rows and columns of its part --sum over ranks-->
    each rank: the same row and column statistics -> update of its part -> sums of squares --sum over ranks--> step

Two messages a flat master and step, of rows + columns and of one number a parameter. torch's own class would see a flat
shard as one vector: it would keep a full second moment, which is the memory that Adafactor is there to save, and would
take the sizes by which it scales from the shard.

Source: Shazeer and Stern, Adafactor (arXiv:1804.04235), as ``torch.optim.Adafactor`` has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World
from mmscale.engine.optimizers.shards import Exchange, FlatMaster, Piece
from mmscale.optim.config import AdafactorConfig

_EPS = torch.finfo(torch.float32).eps
State = dict[str, Tensor]


class Adafactor(torch.optim.Optimizer):
    """Factored second moments of matrices (the last two dimensions), whole ones of vectors; no first moment.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        config: Rates.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdafactorConfig) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._config = config
        self._masters: dict[int, tuple[FlatMaster, Exchange]] = {}
        self._statistics: dict[str, State] = {}

    def attach(self, masters: Sequence[FlatMaster], world: World) -> None:
        """Tells what the stepped tensors are made of. All ranks must call; without it nothing is stepped."""
        self._masters = {id(master.values): (master, Exchange(master, world)) for master in masters}
        for master in masters:
            for piece in master.pieces:
                self._statistics[piece.name] = _zeros(piece.shape, master.values.device)

    def whole_state(self) -> dict[str, Tensor]:
        """State that every rank holds whole, the same on all: ``parameter|kind`` to a writable tensor."""
        return {
            f"{name}|{kind}": values
            for name, statistics in self._statistics.items()
            for kind, values in statistics.items()
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of what is in ``param_groups`` now: under ZeRO one group, or one part of a group, at a time."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None and id(values) in self._masters:
                    self._step_flat(group, values, values.grad)

    def _step_flat(self, group: dict[str, Any], values: Tensor, gradient: Tensor) -> None:
        master, exchange = self._masters[id(values)]
        count = self.state[values]["step"]
        count += 1
        steps = count.item()
        sizes = self._learn(master, exchange, values, gradient, steps**self._config.beta2_decay)
        updates = [self._update(piece, piece.of(gradient)) for piece in master.pieces]
        squares = exchange.sum_(torch.stack([update.square().sum() for update in updates]))
        numels = torch.tensor([math.prod(piece.shape) for piece in master.pieces], device=squares.device)
        rate = min(group["lr"], 1 / math.sqrt(steps)) * (sizes / numels).sqrt().clamp(min=self._config.min_scale)
        rate = rate / ((squares / numels).sqrt() / self._config.update_clip).clamp(min=1.0)
        values.mul_(1 - group["lr"] * group["weight_decay"])
        for piece, update, factor in zip(master.pieces, updates, rate.unbind(), strict=True):
            piece.of(values).sub_(update.mul_(factor))

    def _learn(
        self, master: FlatMaster, exchange: Exchange, values: Tensor, gradient: Tensor, new_share: float
    ) -> Tensor:
        """Takes the gradient into the statistics.

        Returns:
            Sum of squares of each whole parameter.
        """
        sums = [_sums(piece, piece.of(gradient)) for piece in master.pieces]
        sizes = torch.stack([piece.of(values).square().sum() for piece in master.pieces])
        message = exchange.sum_(torch.cat([sizes, *(part.view(-1) for state in sums for part in state.values())]))
        sizes, *parts = message.split([len(sizes), *(part.numel() for state in sums for part in state.values())])
        whole: Iterator[Tensor] = iter(parts)
        for piece in master.pieces:
            for kind, statistic in self._statistics[piece.name].items():
                summed = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}.get(kind)
                length = 1 if summed is None else piece.shape[summed]
                statistic.lerp_(next(whole).view_as(statistic) / length, new_share)
        return sizes

    def _update(self, piece: Piece, gradient: Tensor) -> Tensor:
        statistics = self._statistics[piece.name]
        if len(piece.shape) < 2:
            variance = statistics["exp_avg_sq"].view(-1)[piece.start : piece.stop]
        else:
            row, column = statistics["exp_avg_sq_row"], statistics["exp_avg_sq_col"]
            row = row / row.mean(dim=-2, keepdim=True).clamp(min=_EPS)  # (..., R, 1)
            first, last = _rows_of(piece)
            which = torch.arange(first, last, device=gradient.device) // piece.rows
            lines = row.view(-1)[first:last, None] * column.view(-1, piece.columns)[which]
            lead = piece.start - first * piece.columns
            variance = lines.view(-1)[lead : lead + piece.stop - piece.start]
        return variance.clamp(min=_EPS * _EPS).rsqrt() * gradient


def _zeros(shape: tuple[int, ...], device: torch.device) -> State:
    if len(shape) < 2:
        return {"exp_avg_sq": torch.zeros(shape, device=device)}
    *outer, rows, columns = shape
    return {
        "exp_avg_sq_row": torch.zeros(*outer, rows, 1, device=device),
        "exp_avg_sq_col": torch.zeros(*outer, 1, columns, device=device),
    }


def _rows_of(piece: Piece) -> tuple[int, int]:
    """The rows, of all matrices of the parameter in sequence, that the part touches."""
    return piece.start // piece.columns, max(piece.start // piece.columns, -(-piece.stop // piece.columns))


def _sums(piece: Piece, gradient: Tensor) -> State:
    """This part's share of the sums of squares, in the shapes of the statistics."""
    sums = _zeros(piece.shape, gradient.device)
    if len(piece.shape) < 2:
        sums["exp_avg_sq"].view(-1)[piece.start : piece.stop] = gradient.square()
        return sums
    first, last = _rows_of(piece)
    lines = gradient.new_zeros(last - first, piece.columns)
    lead = piece.start - first * piece.columns
    lines.view(-1)[lead : lead + piece.stop - piece.start] = gradient.square()
    sums["exp_avg_sq_row"].view(-1)[first:last] = lines.sum(dim=1)
    which = torch.arange(first, last, device=gradient.device) // piece.rows
    sums["exp_avg_sq_col"].view(-1, piece.columns).index_add_(0, which, lines)
    return sums
