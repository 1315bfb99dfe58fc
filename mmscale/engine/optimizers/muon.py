"""Muon on ZeRO's shards; the rest by AdamW.

    momentum of a matrix, in parts on all ranks --deal--> whole on one rank --orthogonalise--> --deal back--> step

As many matrices as there are ranks are on their way at once, one for each rank: the work is shared out, and no rank
holds more than one whole matrix beside its shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World
from mmscale.engine.optimizers.shards import Exchange, FlatMaster, matrices, overlap
from mmscale.errors import UnsupportedError
from mmscale.optim.config import MuonConfig
from mmscale.optim.schedule import MUON_MOMENTS, can_fuse


class Muon(torch.optim.AdamW):
    """``torch.optim.Muon`` for the groups that keep a momentum, ``torch.optim.AdamW`` for the others.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        config: Rates of both.

    Raises:
        UnsupportedError: this torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], config: MuonConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UnsupportedError(f"optimizer muon: torch {torch.__version__} has none; install torch 2.9 or newer")
        super().__init__(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=can_fuse(groups))
        self._config = config
        self._masters: dict[int, tuple[FlatMaster, Exchange]] = {}

    def attach(self, masters: Sequence[FlatMaster], world: World) -> None:
        """Tells what the stepped tensors are made of. All ranks must call; without it matrices are not stepped."""
        chosen = [master for master in masters if master.group["state_kinds"] == MUON_MOMENTS]
        self._masters = {id(master.values): (master, Exchange(master, world)) for master in chosen}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of what is in ``param_groups`` now: under ZeRO one group, or one part of a group, at a time."""
        groups = self.param_groups
        for group in groups:
            if group["state_kinds"] == MUON_MOMENTS:
                for values in group["params"]:
                    if values.grad is not None and id(values) in self._masters:
                        self._step_matrices(group, values)
        self.param_groups = [group for group in groups if group["state_kinds"] != MUON_MOMENTS]
        super().step(closure)
        self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any], values: Tensor) -> None:
        state, gradient = self.state[values], values.grad
        assert gradient is not None
        momentum = state["momentum_buffer"]
        state["step"] += 1
        momentum.lerp_(gradient, 1 - self._config.momentum)
        update = gradient.lerp(momentum, self._config.momentum)
        self._orthogonalise(*self._masters[id(values)], update)
        values.mul_(1 - group["lr"] * group["weight_decay"])
        for piece in self._masters[id(values)][0].pieces:
            piece.of(values).add_(piece.of(update), alpha=-group["lr"])

    def _orthogonalise(self, master: FlatMaster, exchange: Exchange, update: Tensor) -> None:
        """Replaces each matrix in the flat ``update`` by its orthogonalised form."""
        world_size, rank, ranges = exchange.world_size, exchange.rank, exchange.ranges
        waiting = matrices(master.pieces)
        for first in range(0, len(waiting), world_size):
            batch = waiting[first : first + world_size]
            parts = [
                master.pieces[index].of(update, *overlap(ranges[rank][index], (low, high)))
                for index, low, high in batch
            ]
            give = [part.numel() for part in parts] + [0] * (world_size - len(batch))
            take = [0] * world_size
            if rank < len(batch):
                index, *bounds = batch[rank]
                spans = [overlap(ranges[other][index], (bounds[0], bounds[1])) for other in range(world_size)]
                take = [high - low for low, high in spans]
            whole = exchange.deal(torch.cat(parts), give, take)
            if rank < len(batch):
                piece = master.pieces[batch[rank][0]]
                whole = self._one(whole.view(piece.rows, piece.columns)).reshape(-1)
            back = exchange.deal(whole, take, give).to(update.device)
            for part, values in zip(parts, back.split(give[: len(parts)]), strict=True):
                part.copy_(values)

    def _one(self, direction: Tensor) -> Tensor:
        """torch's own Muon steps a matrix of zeros by a rate of -1 times the direction, without momentum."""
        matrix = torch.nn.Parameter(torch.zeros_like(direction))
        matrix.grad = -direction
        torch.optim.Muon(
            [matrix],
            lr=1.0,
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            ns_steps=self._config.newton_schulz_steps,
            adjust_lr_fn="match_rms_adamw",
        ).step()
        return matrix.detach()
