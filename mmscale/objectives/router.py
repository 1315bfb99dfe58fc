"""Losses of routers: load balance and z loss, averaged over the valid tokens of a step on all ranks.

    sums of each microbatch --added over microbatches and ranks--> StepTotals --> share of each microbatch in the losses

The balance loss multiplies the load of an expert by its mean probability, so it is not a mean over tokens. For
``balance=global`` the load of the whole step must be known before the first backward pass. A step with one microbatch
a rank adds the loads of all ranks after its forward pass. A step with several runs the model on all of them first,
without gradients. Dropout masks are hashes, so both passes choose the same experts.

Source: Fedus et al. 2022, "Switch Transformers", section 2.2; Qiu et al. 2025, "Demons in the detail"
(arXiv 2501.11873), section 3, for the load of the global batch, there of the microbatches so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch
from mmscale.nn.host import to_device
from mmscale.nn.moe import MoeConfig
from mmscale.nn.router import RouterTensors
from mmscale.objectives.base import OneRank, WorldInfo


@dataclass(frozen=True)
class StepTotals:
    """Sums over all microbatches and ranks of a step.

    Attributes:
        load: float64 ``(L, E)``, number of times that a token chose each expert; None if the losses do not need it.
        tokens: float64 ``()``, valid tokens.
        weight: float64 ``()``, loss weights.
    """

    load: Tensor | None
    tokens: Tensor
    weight: Tensor


@dataclass(frozen=True)
class PreparedBatch:
    """A microbatch with the sums of its step."""

    batch: MultimodalBatch
    totals: StepTotals

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreparedBatch:
        """Return a copy with the microbatch on ``device``. The sums stay on the device of the model."""
        return replace(self, batch=self.batch.to(device, non_blocking))


def needs_whole_load(config: MoeConfig) -> bool:
    """Return whether the balance loss needs the load of the whole step."""
    return config.balance == "global" and config.balance_coefficient > 0


class RouterLosses:
    """Adds the losses of routers to an objective.

    Args:
        world: The ranks that share a step; None for one rank on the CPU. If there are several ranks and no ``world``,
            ``prepare`` and ``losses`` raise ``ValueError``.
    """

    def __init__(self, world: WorldInfo | None = None) -> None:
        self._world = world or OneRank()

    def prepare(self, model: Any, microbatches: Sequence[MultimodalBatch]) -> list[PreparedBatch]:
        """Return the microbatches of a step of a model with experts, with the sums that ``losses`` needs.

        All ranks must call, without gradients, with the model in training mode, and with the same number of
        microbatches.
        """
        config, loads = model.config.decoder.mlp, []
        if needs_whole_load(config):
            loads = [model(batch.to(self._world.device, non_blocking=True)).router.load for batch in microbatches]
        totals = self._totals(loads, microbatches)
        return [PreparedBatch(batch, totals) for batch in microbatches]

    def losses(
        self, config: MoeConfig, router: RouterTensors, batch: MultimodalBatch, totals: StepTotals | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sum of a microbatch, and metrics: sums like those of ``ObjectiveOutput``.

        Divided by the loss weight of the step and summed over all its microbatches, both losses are means over the
        blocks and over the valid tokens of the step. All ranks must call.

        Args:
            config: The feed-forward of the model.
            router: Stacked result of the model for the microbatch.
            batch: The microbatch.
            totals: Sums of the step, from ``prepare``; None if this microbatch is the only one of this rank.
        """
        if totals is None:
            totals = self._totals([router.load], [batch])
        # A step of dummy documents alone has no tokens and no weight. Both losses are then 0, with their graph.
        factor = (totals.weight / totals.tokens.clamp(min=1.0)).float()
        balance = router.balance
        if totals.load is not None and config.balance == "global":
            # The sum over all microbatches of (tokens x balance): linear in ``importance``, as the load is constant.
            shares = config.grouped(totals.load / totals.load.sum(-1, keepdim=True).clamp(min=1.0)).float()
            balance = shares.shape[-1] * (shares * config.grouped(router.importance)).sum(-1)
        balance, z = factor * balance.mean(), factor * router.z.mean()
        loss = config.balance_coefficient * balance + config.z_coefficient * z
        return loss, {"router_balance": balance.detach(), "router_z": z.detach()}

    @torch.no_grad()
    def _totals(self, loads: Sequence[Tensor], microbatches: Sequence[MultimodalBatch]) -> StepTotals:
        """Return the sums over all microbatches and ranks. All ranks must call."""
        host = [sum(batch.num_tokens for batch in microbatches), sum(batch.weight for batch in microbatches)]
        own = to_device(torch.tensor(host, dtype=torch.float64), self._world.device)
        if loads:
            load = torch.stack([each.sum(1) for each in loads]).sum(0).double()
            own = torch.cat([own, load.flatten()])
        whole = torch.stack(self._world.gather_rows(own)).sum(0)
        return StepTotals(whole[2:].view(load.shape) if loads else None, whole[0], whole[1])
