"""The router of a mixture of experts: scores experts, chooses some for each row, and measures the balance.

    rows --linear, float32--> logits --softmax or sigmoid--> scores --+ bias, groups--> chosen experts and weights
                                                                \\--> RouterTensors: what the losses need

The balance of a whole step depends on the choices on all ranks, so this module returns sums over rows.
``mmscale.objectives.router`` computes the losses from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.dropout import Dropout
from mmscale.nn.host import to_device
from mmscale.nn.sizes import NumExperts

TEXT, IMAGE = 0, 1
"""Kinds of rows that the router always counts separately. Those of further modalities of the model follow."""


class RouterOrder(str, Enum):
    """How the weights of the chosen experts follow from the logits."""

    SOFTMAX_THEN_TOPK = "softmax_then_topk"
    """OLMoE, Qwen-MoE, Switch."""
    TOPK_THEN_SOFTMAX = "topk_then_softmax"
    """Aria, Mixtral."""
    SIGMOID = "sigmoid"
    """DeepSeek-V3, GLM-4.5."""


class RouterConfig(StrictConfig):
    """Choice of experts, and the losses that keep their load equal."""

    num_experts: NumExperts
    """E, routed experts."""
    experts_per_token: NumExperts
    """A, experts that each token uses."""
    router: RouterOrder = RouterOrder.SOFTMAX_THEN_TOPK
    """``softmax_then_topk``: softmax over all experts, then the choice. ``topk_then_softmax``: the choice, then softmax
    over the chosen experts. ``sigmoid``: a sigmoid of each logit, then the choice."""
    renormalise: bool = False
    """Scale the weights of the chosen experts to sum to 1; not with ``router=topk_then_softmax``, where they do."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the weights of the chosen experts, after ``renormalise`` (DeepSeek-V3: 2.5)."""
    choice_groups: NumExperts = 1
    """Number of groups of consecutive experts. If it is above 1, a token first chooses ``groups_per_token`` groups, and
    then its experts among theirs (DeepSeek-V3: 8). The score of a group is its best expert's, or with
    ``router=sigmoid`` the sum of its best two."""
    groups_per_token: NumExperts = 1
    """Groups that each token chooses among ``choice_groups``."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training, multiply each channel of the router's input by a random factor between ``1 - jitter`` and
    ``1 + jitter`` (Switch: 0.01). The factor does not depend on ranks and microbatches."""
    balance: Literal["global", "microbatch", "sequence"] = "global"
    """Tokens whose load the balance loss makes equal: all tokens of the step on all ranks, those of each microbatch, or
    those of each document. ``global`` and ``sequence`` do not depend on ranks and microbatches. ``global`` with several
    microbatches a rank runs each forward pass twice, because the load must be known before the first backward pass."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the load-balance loss. The loss is 1 at perfect balance."""
    balance_groups: NumExperts | None = None
    """Number of groups of consecutive experts whose summed loads are made equal (Aria: 8 of 64 experts); null: each
    expert is a group."""
    z_coefficient: float = Field(default=0.001, ge=0)
    """Weight of the router z loss: the mean square of the logsumexp of the router's logits."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Step size of the expert biases that balance the load without a loss (DeepSeek-V3: 0.001); 0 for no biases. After
    each step, each expert's bias moves by this much towards equal load over all ranks. Biases affect the choice of
    experts, not their weights."""

    @model_validator(mode="after")
    def _possible_choice(self) -> RouterConfig:
        experts, groups = self.num_experts, self.choice_groups
        if self.experts_per_token > experts:
            raise ValueError(f"experts_per_token={self.experts_per_token}: there are {experts} experts")
        if self.renormalise and self.router is RouterOrder.TOPK_THEN_SOFTMAX:
            raise ValueError("renormalise: weights already sum to 1 with router=topk_then_softmax; leave it false")
        if experts % groups or self.groups_per_token > groups:
            raise ValueError(
                f"choice_groups={groups}: must divide num_experts={experts} and be at least "
                f"groups_per_token={self.groups_per_token}"
            )
        if self.experts_per_token > (found := experts // groups * self.groups_per_token):
            raise ValueError(f"experts_per_token={self.experts_per_token}: the chosen groups have {found} experts")
        if self.balance_groups is not None and experts % self.balance_groups:
            raise ValueError(f"balance_groups={self.balance_groups}: must divide num_experts={experts}")
        return self

    def grouped(self, values: Float[Tensor, "... E"]) -> Float[Tensor, "... N"]:
        """Return sums over the experts of each balance group."""
        return values if self.balance_groups is None else values.unflatten(-1, (self.balance_groups, -1)).sum(-1)

    def balance_of(self, load: Float[Tensor, "... E"], importance: Float[Tensor, "... E"]) -> Float[Tensor, "..."]:
        """Return the balance loss of tokens, 1 at perfect balance.

        Args:
            load: Number of times that the tokens chose each expert; may be all 0, which costs 0.
            importance: Sum of the tokens' probabilities of each expert, with gradient.

        Source: Fedus et al. 2022, "Switch Transformers", section 2.2, here for A experts a token; Aria (arXiv
        2410.05993, section 2.2) for groups of experts.
        """
        choices = load.sum(-1, keepdim=True).clamp(min=1.0)
        tokens = choices / self.experts_per_token
        shares, means = self.grouped(load / choices), self.grouped(importance / tokens)
        return shares.shape[-1] * (shares * means).sum(-1)


@dataclass(frozen=True)
class RoutedRows:
    """Properties of the rows of a microbatch that routers need.

    Attributes:
        valid: bool ``(T,)``, rows that use experts and count; False in dummy documents and padding.
        kind: int64 ``(T,)``, ``TEXT``, ``IMAGE``, or from 2 on the number of a further modality, of each row.
        offsets: int64 ``(S + 1,)``, bounds of the documents among the rows.
        num_valid: Exact number of valid rows if the host knows it, which then need not wait for the device to find
            them; None if it does not.
        num_kinds: Number of kinds of rows that the model can have, at least 2.
    """

    valid: Bool[Tensor, " T"]
    kind: Int[Tensor, " T"]
    offsets: Int[Tensor, " S_1"]
    num_valid: int | None = None
    num_kinds: int = 2

    @classmethod
    def text(cls, valid: Bool[Tensor, " T"], num_valid: int | None = None) -> RoutedRows:
        """Return the rows of one document without images."""
        offsets = torch.tensor([0, len(valid)], device=valid.device)
        return cls(valid, torch.zeros_like(valid, dtype=torch.int64), offsets, num_valid)

    @cached_property
    def index(self) -> Int[Tensor, " V"] | None:
        """int64 ``(V,)``, indices of the valid rows; None if the host knows that all rows are valid."""
        if self.num_valid is None:
            return self.valid.nonzero().flatten()
        return None if self.num_valid == len(self.valid) else self.valid.nonzero_static(size=self.num_valid).flatten()


class RouterTensors(NamedTuple):
    """Sums over the valid rows of a microbatch in one block; of L blocks after ``stack``.

    Attributes:
        importance: float32 ``(E,)`` with gradient, sum of the rows' probabilities of each expert.
        balance: float32 ``()`` with gradient: over microbatch or documents the sum of (rows x balance loss); 0 with
            ``balance=global``.
        z: float32 ``()`` with gradient, sum of the squared logsumexp of the logits.
        load: int64 ``(K, E)``, number of times that rows of each of the K kinds chose each expert.
        entropy: float32 ``(K,)``, sum over the rows of each kind of the entropy of their probabilities, in nats.
        dropped: int64 ``()``, number of choices that no expert computed because of ``capacity_factor``.
    """

    importance: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor
    entropy: Tensor
    dropped: Tensor

    @classmethod
    def stack(cls, blocks: list[RouterTensors]) -> RouterTensors:
        """Return the tensors of L blocks, at least one, with L as their first dimension."""
        return cls(*(torch.stack(parts) for parts in zip(*blocks, strict=True)))


class Router(nn.Module):
    """Scores and chooses experts, in float32 whatever the number format of the rows.

    Attributes:
        bias_steps: int64 ``(E,)``, bias of each expert in units of ``bias_rate``. Exists only if ``bias_rate`` is above
            0. Integers, so that no mixed-precision engine rounds them.

    Source: Shazeer et al. 2017; Zoph et al. 2022, "ST-MoE", section 3.3 (z loss); Wang et al. 2024,
    "Auxiliary-loss-free load balancing", algorithm 1 (bias); DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) for the
    sigmoid, groups and scale.
    """

    bias_steps: Tensor

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)
        if config.bias_rate:
            self.register_buffer("bias_steps", torch.zeros(config.num_experts, dtype=torch.int64))
        self.config = config

    def forward(
        self, hidden: Float[Tensor, "T D"], rows: RoutedRows, noise: Dropout | None = None
    ) -> tuple[Float[Tensor, "T A"], Int[Tensor, "T A"], RouterTensors]:
        """Return weights and indices of each row's chosen experts, and sums over the valid rows.

        Args:
            hidden: Rows.
            rows: Their properties.
            noise: Random numbers of the rows for ``jitter``; None for no jitter.
        """
        config, inputs = self.config, hidden.float()
        if noise is not None and config.jitter:
            inputs = inputs * noise.jitter(config.jitter, inputs.shape[1])
        logits = F.linear(inputs, self.weight.float())  # (T, E)
        if config.router is RouterOrder.SIGMOID:
            scores = logits.sigmoid()
            probabilities = scores / scores.sum(-1, keepdim=True)
        else:
            probabilities = logits.softmax(-1)
            scores = probabilities if config.router is RouterOrder.SOFTMAX_THEN_TOPK else logits
        chosen = self._choose(scores.detach())
        weights = scores.gather(1, chosen)
        if config.router is RouterOrder.TOPK_THEN_SOFTMAX:
            weights = weights.softmax(-1)
        elif config.renormalise:
            # A token's sigmoids may all be nearly 0; those of a softmax are not.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (weights * config.scale).to(hidden.dtype), chosen, self._sums(logits, probabilities, chosen, rows)

    def _choose(self, scores: Float[Tensor, "T E"]) -> Int[Tensor, "T A"]:
        """Return the experts of each row, the best first. The bias affects the choice only."""
        config = self.config
        if config.bias_rate:
            scores = scores + self.bias_steps * config.bias_rate
        if config.choice_groups > 1:
            by_group = scores.unflatten(1, (config.choice_groups, -1))
            best = min(2 if config.router is RouterOrder.SIGMOID else 1, by_group.shape[2])
            groups = by_group.topk(best, dim=2).values.sum(2).topk(config.groups_per_token, dim=1).indices
            outside = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(1, groups, value=False)
            scores = by_group.masked_fill(outside.unsqueeze(2), -torch.inf).flatten(1)
        return scores.topk(config.experts_per_token, dim=-1).indices

    def _sums(self, logits: Tensor, probabilities: Tensor, chosen: Tensor, rows: RoutedRows) -> RouterTensors:
        config, mask = self.config, rows.valid.float()
        counts = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0) * mask[:, None]
        probabilities = probabilities * mask[:, None]
        by_kind = torch.stack([rows.valid & (rows.kind == kind) for kind in range(rows.num_kinds)]).float()
        importance = probabilities.sum(0)
        if config.balance == "global":
            balance = logits.new_zeros(())
        elif config.balance == "microbatch":
            balance = mask.sum() * config.balance_of(counts.sum(0), importance)
        else:
            documents = [torch.segment_reduce(each, "sum", offsets=rows.offsets) for each in (counts, probabilities)]
            num_rows = torch.segment_reduce(mask, "sum", offsets=rows.offsets)
            balance = (num_rows * config.balance_of(*documents)).sum()
        with torch.no_grad():
            # float32 counts exactly up to 2^24 rows.
            load = (by_kind @ counts).long()
            entropy = by_kind @ torch.special.entr(probabilities).sum(-1)
            dropped = load.new_zeros(())
        return RouterTensors(importance, balance, mask @ logits.logsumexp(-1).square(), load, entropy, dropped)

    def rebalance(self, load: Int[Tensor, " E"]) -> None:
        """Raise the bias of each expert with less than the mean load by ``bias_rate``, and lower that of the others.

        A bias whose expert has exactly the mean load is unchanged.

        Args:
            load: int64, number of tokens that chose each expert, summed over microbatches and ranks.
        """
        self.bias_steps += to_device((load.sum() - load * len(load)).sign(), self.bias_steps.device)


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of a model, in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, Router)]
