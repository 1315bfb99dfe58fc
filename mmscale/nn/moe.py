"""Mixture of experts: a router and stacked expert weights, without a capacity limit and without dropped tokens.

    rows --router--> A experts each --sort by expert--> per-expert projections --un-sort, weigh, sum--> rows

All experts share one parameter per matrix. A rank without rows for an expert therefore still runs the same modules as
the other ranks.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.block import ACTIVATIONS, Activation, DenseMlpConfig, Mlp, MlpBase
from mmscale.nn.sizes import Layers, NumExperts, ShrunkTo, Width


class RouterOrder(str, Enum):
    """Whether the softmax runs over all experts or over the chosen ones."""

    SOFTMAX_THEN_TOPK = "softmax_then_topk"
    """OLMoE, Qwen-MoE, Switch."""
    TOPK_THEN_SOFTMAX = "topk_then_softmax"
    """Aria, Mixtral."""


class MoeConfig(MlpBase):
    """Feed-forward block with routed experts."""

    has_experts: ClassVar[bool] = True
    kind: Literal["moe"] = "moe"
    num_experts: NumExperts
    """E, routed experts."""
    experts_per_token: NumExperts
    """A, experts that each token uses."""
    expert_dim: Width
    """F of each routed expert; a multiple of 8 for the grouped CUDA kernel."""
    activation: Activation = Activation.SILU
    """Non-linearity of the gated experts."""
    router: RouterOrder = RouterOrder.SOFTMAX_THEN_TOPK
    """``softmax_then_topk``: softmax over all experts, then the choice. ``topk_then_softmax``: the choice, then softmax
    over the chosen experts."""
    renormalise: bool = False
    """Scale the weights of the chosen experts to sum to 1; only with ``router=softmax_then_topk``."""
    shared_dim: int = Field(default=0, ge=0, le=1 << 20)
    """F of the shared expert, which every token uses in addition; 0 for none."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a sigmoid gate per token (Qwen-MoE)."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the load-balance loss. The loss is 1 at perfect balance."""
    z_coefficient: float = Field(default=0.001, ge=0)
    """Weight of the router z loss: the mean square of the logsumexp of the router's logits."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Step size of the expert biases that balance the load without a loss (DeepSeek-V3: 0.001); 0 for no biases. After
    each step, each expert's bias moves by this much towards equal load. Biases affect the choice of experts, not
    their weights."""
    every: Annotated[Layers, ShrunkTo(2)] = 1
    """Every n-th block has experts: blocks n-1, 2n-1, ... (0-based); the others use ``dense``."""
    dense: DenseMlpConfig | None = None
    """Feed-forward of the blocks without experts. Required if ``every`` is above 1, otherwise null."""

    @model_validator(mode="after")
    def _consistent(self) -> MoeConfig:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token}: there are {self.num_experts} experts")
        if self.renormalise and self.router is RouterOrder.TOPK_THEN_SOFTMAX:
            raise ValueError("renormalise: weights already sum to 1 with router=topk_then_softmax; leave it false")
        if self.shared_gate and not self.shared_dim:
            raise ValueError("shared_gate: there is no shared expert; set shared_dim")
        if (self.every > 1) != (self.dense is not None):
            raise ValueError(f"every={self.every}: dense must be set if and only if every is above 1")
        return self

    def for_block(self, number: int) -> MoeConfig | DenseMlpConfig:
        """Return the feed-forward of the 0-based block ``number``: ``self``, or ``dense`` in blocks without experts."""
        return self if self.dense is None or (number + 1) % self.every == 0 else self.dense

    def build(self, dim: int) -> nn.Module:
        return MoeMlp(dim, self)

    def flops_per_row(self, dim: int) -> int:
        """Return the forward operations of one row: its experts, the shared expert, and the router."""
        routed = 6 * dim * self.expert_dim * self.experts_per_token
        shared = 6 * dim * self.shared_dim + (2 * dim if self.shared_gate else 0)
        return routed + shared + 2 * dim * self.num_experts

    def last_product(self, dim: int) -> int:
        return 2 * dim * self.shared_dim if self.shared_dim and not self.shared_gate else 0


class Router(nn.Module):
    """Scores and chooses experts; computes the two auxiliary losses.

    Attributes:
        bias_steps: int64 ``(E,)``, bias of each expert in units of ``bias_rate``. Exists only if ``bias_rate`` is above
            0. Integers, so that no mixed-precision engine rounds them.
        load: int64 ``(E,)``, number of times a valid token chose each expert in training since the caller last cleared
            it. Exists with ``bias_steps``. Activation checkpointing counts each token twice, which does not change the
            sign that ``rebalance`` uses.

    Source: Fedus et al. 2022, "Switch Transformers", section 2.2 (balance; here for A experts per token, and 1 at
    perfect balance); Zoph et al. 2022, "ST-MoE", section 3.3 (z loss); Wang et al. 2024, "Auxiliary-loss-free load
    balancing", algorithm 1 (bias).
    """

    bias_steps: Tensor
    load: Tensor

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)
        if config.bias_rate:
            self.register_buffer("bias_steps", torch.zeros(config.num_experts, dtype=torch.int64))
            self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)
        self.config = config

    def forward(
        self, hidden: Float[Tensor, "T D"], valid: Bool[Tensor, " T"]
    ) -> tuple[Float[Tensor, "T A"], Int[Tensor, "T A"], Float[Tensor, "2"]]:
        """Return weights and indices of the chosen experts, and (balance, z) averaged over ``valid`` rows.

        In training with ``bias_rate``, adds the choices of valid rows to ``load``, unless the router is frozen.
        """
        config = self.config
        logits = F.linear(hidden, self.weight).float()  # (T, E)
        probabilities = logits.softmax(-1)
        if config.router is RouterOrder.SOFTMAX_THEN_TOPK:
            weights, chosen = self._choose(probabilities, valid)
            if config.renormalise:
                weights = weights / weights.sum(-1, keepdim=True)
        else:
            top, chosen = self._choose(logits, valid)
            weights = top.softmax(-1)
        return weights.to(hidden.dtype), chosen, self._losses(logits, probabilities, chosen, valid)

    def _choose(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and indices of each row's best experts; the bias affects the choice, not the scores."""
        copies = self.config.experts_per_token
        if not self.config.bias_rate:
            return scores.topk(copies, dim=-1)
        chosen = (scores.detach() + self.bias_steps * self.config.bias_rate).topk(copies, dim=-1).indices
        if self.training and self.weight.requires_grad:
            self.load.scatter_add_(0, chosen.flatten(), valid.long().repeat_interleave(copies))
        return scores.gather(1, chosen), chosen

    def rebalance(self, load: Int[Tensor, " E"]) -> None:
        """Raise the bias of each expert with less than the mean load by ``bias_rate``, and lower that of the others.

        A bias whose expert has exactly the mean load is unchanged.

        Args:
            load: Number of tokens that chose each expert, summed over microbatches and ranks.
        """
        self.bias_steps += (load.sum() - load * len(load)).sign()

    def _losses(self, logits: Tensor, probabilities: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
        mask = valid.float()
        share = mask / mask.sum().clamp(min=1.0)  # Without valid rows the losses are 0, not 0 / 0.
        counts = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
        load = share @ counts / self.config.experts_per_token  # (E,), sums to 1
        importance = share @ probabilities
        balance = self.config.num_experts * (load * importance).sum()
        z = share @ logits.logsumexp(-1).square()
        return torch.stack([balance, z])


def biased_routers(model: nn.Module) -> list[Router]:
    """Return the routers of a model that have biases and are trained."""
    routers = (module for module in model.modules() if isinstance(module, Router))
    return [router for router in routers if router.config.bias_rate and router.weight.requires_grad]


class Experts(nn.Module):
    """E gated feed-forward networks, stacked.

    The gate and up projections are one matrix ``(E, 2 F, D)``, gate first, as in Hugging Face's expert modules.
    """

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, dim, config.expert_dim))
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        self.activate = ACTIVATIONS[config.activation]
        self.num_experts = config.num_experts
        self.experts_per_token = config.experts_per_token

    def forward(self, rows: Float[Tensor, "R D"], experts: Int[Tensor, " R"]) -> Float[Tensor, "R D"]:
        """Return the output of each row's expert. ``rows`` must be sorted by ``experts``, the expert of each row."""
        counts = torch.bincount(experts, minlength=self.num_experts)
        if rows.is_cuda and rows.dtype is torch.bfloat16 and hasattr(F, "grouped_mm"):
            return self._grouped(rows, counts)
        return self._split(rows, counts.tolist())

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(self.activate(gate) * up, self.down_proj.transpose(1, 2), offs=ends)

    def _split(self, rows: Tensor, counts: list[int]) -> Tensor:
        # unbind, not W[e]: indexing in a loop allocates a gradient of the whole stack per expert, 5x to 70x slower.
        outputs = []
        stacks = zip(rows.split(counts), self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        for part, gate_up, down in stacks:
            gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(self.activate(gate) * up, down))
        return torch.cat(outputs)


class MoeMlp(nn.Module):
    """Routed experts plus, optionally, a shared one.

    Source: Shazeer et al. 2017; Gale et al. 2022, "MegaBlocks" (dropless); Dai et al. 2024, "DeepSeekMoE" (shared).
    """

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.gate = Router(dim, config)
        self.experts = Experts(dim, config)
        if config.shared_dim:
            shared = DenseMlpConfig(hidden_dim=config.shared_dim, activation=config.activation)
            self.shared_expert = Mlp(dim, shared)
            if config.shared_gate:
                self.shared_expert_gate = nn.Linear(dim, 1, bias=False)
        self.config = config

    def forward(
        self, hidden: Float[Tensor, "T D"], valid: Bool[Tensor, " T"] | None
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "2"]]:
        """Return the output rows and the losses (balance, z).

        Rows that are not ``valid`` have an output but do not count in the losses. None: all rows are valid.
        """
        if valid is None:
            valid = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        weights, chosen, losses = self.gate(hidden, valid)
        copies = self.config.experts_per_token
        experts, order = chosen.flatten().sort(stable=True)
        # Repeat, then permute: both have deterministic gradients. Gathering repeated rows has not (CUDA atomics).
        rows = hidden.repeat_interleave(copies, 0).index_select(0, order)
        outputs = self.experts(rows, experts).index_select(0, order.argsort())  # back in (T, A) order
        mixed = (outputs.view(-1, copies, hidden.shape[-1]) * weights.unsqueeze(-1)).sum(1)
        if self.config.shared_dim:
            shared = self.shared_expert(hidden)
            if self.config.shared_gate:
                shared = shared * self.shared_expert_gate(hidden).sigmoid()
            mixed = mixed + shared
        return mixed, losses
