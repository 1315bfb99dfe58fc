"""Muon on ZeRO's shards. AdamW steps all parameters that are no linear maps: norms, biases, embeddings and heads.

    update of a matrix, sharded --all-to-all--> whole on one rank --orthogonalise--> --all-to-all--> sharded, step

Each round processes one matrix on each rank in parallel. So no rank holds more than one whole matrix in addition to its
shards.
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


def check_muon() -> None:
    """Check that this torch has ``torch.optim.Muon``.

    Raises:
        UnsupportedError: it has none.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UnsupportedError(f"optimizer muon: torch {torch.__version__} has none; install torch 2.9 or newer")


class Muon(torch.optim.AdamW):
    """``torch.optim.Muon`` for the groups with a momentum, ``torch.optim.AdamW`` for the other groups.

    Args:
        groups: From ``mmscale.optim.schedule.parameter_groups``.
        config: Settings of both.

    Raises:
        UnsupportedError: this torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], config: MuonConfig) -> None:
        check_muon()
        super().__init__(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=can_fuse(groups))
        self._config = config
        self._masters: dict[int, tuple[FlatMaster, Exchange]] = {}

    def attach(self, masters: Sequence[FlatMaster], world: World) -> None:
        """Set the parameters that the flat tensors consist of. All ranks must call. Other matrices are not stepped."""
        chosen = [master for master in masters if master.group["state_kinds"] == MUON_MOMENTS]
        self._masters = {id(master.values): (master, Exchange(master, world)) for master in chosen}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the tensors in ``param_groups``. ZeRO calls this for one group, or a part of one, at a time."""
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
        for shard in self._masters[id(values)][0].shards:
            shard.view_of(values).add_(shard.view_of(update), alpha=-group["lr"])

    def _orthogonalise(self, master: FlatMaster, exchange: Exchange, update: Tensor) -> None:
        """Orthogonalise each matrix in the flat ``update`` in place."""
        world_size, rank, ranges = exchange.world_size, exchange.rank, exchange.ranges
        waiting = matrices(master.shards)
        for first in range(0, len(waiting), world_size):
            batch = waiting[first : first + world_size]
            parts = [
                master.shards[index].view_of(update, *overlap(ranges[rank][index], (low, high)))
                for index, low, high in batch
            ]
            send_counts = [part.numel() for part in parts] + [0] * (world_size - len(batch))
            receive_counts = [0] * world_size
            if rank < len(batch):
                index, *bounds = batch[rank]
                spans = [overlap(ranges[other][index], (bounds[0], bounds[1])) for other in range(world_size)]
                receive_counts = [high - low for low, high in spans]
            whole = exchange.all_to_all(torch.cat(parts), send_counts, receive_counts)
            if rank < len(batch):
                shard = master.shards[batch[rank][0]]
                whole = self._orthogonalised(whole.view(shard.rows, shard.columns)).reshape(-1)
            back = exchange.all_to_all(whole, receive_counts, send_counts).to(update.device)
            for part, values in zip(parts, back.split(send_counts[: len(parts)]), strict=True):
                part.copy_(values)

    def _orthogonalised(self, direction: Tensor) -> Tensor:
        """Return the orthogonalised direction.

        It is the matrix after one step of ``torch.optim.Muon`` from zero, with gradient ``-direction``, rate 1 and no
        momentum.
        """
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
