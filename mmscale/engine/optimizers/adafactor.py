"""Adafactor on ZeRO's shards, with the results of ``torch.optim.Adafactor`` on whole parameters.

    each rank: sums of squared gradients over the rows and columns of its shard --all-reduce-->
    each rank: the same row and column statistics -> update of its shard -> sums of squares --all-reduce--> step

Each step needs two all-reduces for each flat master. The first has the statistics (rows + columns values for a matrix)
and the sum of squared weights of each parameter, the second has one value for each parameter.
``torch.optim.Adafactor`` would treat a flat shard as one vector. It would keep a full second moment, the memory that
Adafactor saves, and would scale by the norm of the shard instead of the parameter's.

Source: Shazeer and Stern, Adafactor (arXiv:1804.04235), in the form of ``torch.optim.Adafactor``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World
from mmscale.engine.optimizers.shards import Exchange, FlatMaster, ParameterShard
from mmscale.optim.config import AdafactorConfig

_EPS = torch.finfo(torch.float32).eps
State = dict[str, Tensor]


class Adafactor(torch.optim.Optimizer):
    """Adafactor: factored second moments of matrices (last two dimensions), full ones of vectors, no first moment.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        config: Decay rate, clipping and scale.
    """

    def __init__(self, groups: list[dict[str, Any]], config: AdafactorConfig) -> None:
        super().__init__(groups, {"lr": 0.0})
        self._config = config
        self._masters: dict[int, tuple[FlatMaster, Exchange]] = {}
        self._statistics: dict[str, State] = {}

    def attach(self, masters: Sequence[FlatMaster], world: World) -> None:
        """Set the parameters that the flat tensors consist of. All ranks must call; unknown tensors are not stepped."""
        self._masters = {id(master.values): (master, Exchange(master, world)) for master in masters}
        for master in masters:
            for shard in master.shards:
                self._statistics[shard.name] = _zeros(shard.shape, master.values.device)

    def whole_state(self) -> dict[str, Tensor]:
        """Return the statistics, which are equal on all ranks: ``parameter|kind`` to a writable tensor."""
        return {
            f"{name}|{kind}": values
            for name, statistics in self._statistics.items()
            for kind, values in statistics.items()
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the tensors in ``param_groups``. ZeRO calls this for one group, or a part of one, at a time."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None and id(values) in self._masters:
                    self._step_flat(group, values, values.grad)

    def _step_flat(self, group: dict[str, Any], values: Tensor, gradient: Tensor) -> None:
        master, exchange = self._masters[id(values)]
        count = self.state[values]["step"]
        count += 1
        steps = count.item()
        sizes = self._update_statistics(master, exchange, values, gradient, steps**self._config.beta2_decay)
        updates = [self._update(shard, shard.view_of(gradient)) for shard in master.shards]
        squares = exchange.all_reduce_sum(torch.stack([update.square().sum() for update in updates]))
        numels = torch.tensor([math.prod(shard.shape) for shard in master.shards], device=squares.device)
        rate = min(group["lr"], 1 / math.sqrt(steps)) * (sizes / numels).sqrt().clamp(min=self._config.min_scale)
        rate = rate / ((squares / numels).sqrt() / self._config.update_clip).clamp(min=1.0)
        values.mul_(1 - group["lr"] * group["weight_decay"])
        for shard, update, factor in zip(master.shards, updates, rate.unbind(), strict=True):
            shard.view_of(values).sub_(update.mul_(factor))

    def _update_statistics(
        self, master: FlatMaster, exchange: Exchange, values: Tensor, gradient: Tensor, new_share: float
    ) -> Tensor:
        """Update the statistics with the gradient, with weight ``new_share``.

        Returns:
            Sum of squares of each whole parameter.
        """
        sums = [_sums(shard, shard.view_of(gradient)) for shard in master.shards]
        sizes = torch.stack([shard.view_of(values).square().sum() for shard in master.shards])
        flat = [values.view(-1) for state in sums for values in state.values()]
        message = exchange.all_reduce_sum(torch.cat([sizes, *flat]))
        sizes, *reduced = message.split([len(sizes), *map(len, flat)])
        whole: Iterator[Tensor] = iter(reduced)
        for shard in master.shards:
            for kind, statistic in self._statistics[shard.name].items():
                summed = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}.get(kind)
                length = 1 if summed is None else shard.shape[summed]
                statistic.lerp_(next(whole).view_as(statistic) / length, new_share)
        return sizes

    def _update(self, shard: ParameterShard, gradient: Tensor) -> Tensor:
        statistics = self._statistics[shard.name]
        if len(shard.shape) < 2:
            variance = statistics["exp_avg_sq"].view(-1)[shard.start : shard.stop]
        else:
            row, column = statistics["exp_avg_sq_row"], statistics["exp_avg_sq_col"]
            row = row / row.mean(dim=-2, keepdim=True).clamp(min=_EPS)  # (..., R, 1)
            first, last = _rows_of(shard)
            which = torch.arange(first, last, device=gradient.device) // shard.rows
            lines = row.view(-1)[first:last, None] * column.view(-1, shard.columns)[which]
            lead = shard.start - first * shard.columns
            variance = lines.view(-1)[lead : lead + shard.stop - shard.start]
        return variance.clamp(min=_EPS * _EPS).rsqrt() * gradient


def _zeros(shape: tuple[int, ...], device: torch.device) -> State:
    if len(shape) < 2:
        return {"exp_avg_sq": torch.zeros(shape, device=device)}
    *outer, rows, columns = shape
    return {
        "exp_avg_sq_row": torch.zeros(*outer, rows, 1, device=device),
        "exp_avg_sq_col": torch.zeros(*outer, 1, columns, device=device),
    }


def _rows_of(shard: ParameterShard) -> tuple[int, int]:
    """Return first and last + 1 of the rows that the shard overlaps, counted over all matrices of the parameter."""
    return shard.start // shard.columns, max(shard.start // shard.columns, -(-shard.stop // shard.columns))


def _sums(shard: ParameterShard, gradient: Tensor) -> State:
    """Return the sums of squares over this shard, in the shapes of the statistics."""
    sums = _zeros(shard.shape, gradient.device)
    if len(shard.shape) < 2:
        sums["exp_avg_sq"].view(-1)[shard.start : shard.stop] = gradient.square()
        return sums
    first, last = _rows_of(shard)
    lines = gradient.new_zeros(last - first, shard.columns)
    lead = shard.start - first * shard.columns
    lines.view(-1)[lead : lead + shard.stop - shard.start] = gradient.square()
    sums["exp_avg_sq_row"].view(-1)[first:last] = lines.sum(dim=1)
    which = torch.arange(first, last, device=gradient.device) // shard.rows
    sums["exp_avg_sq_col"].view(-1, shard.columns).index_add_(0, which, lines)
    return sums
