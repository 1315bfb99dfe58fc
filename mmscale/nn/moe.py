"""Mixture of experts: a router and stacked expert weights, by default without dropped tokens.

    rows --router--> A experts each --sort by expert--> weighted per-expert projections --un-sort, sum--> rows

All experts share one parameter per matrix. A rank without rows for an expert therefore still runs the same modules as
the other ranks.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmscale.nn.block import Activation, DenseMlpConfig, Mlp, MlpBase
from mmscale.nn.dropout import Dropout
from mmscale.nn.experts import Dispatch, Experts
from mmscale.nn.router import RoutedRows, Router, RouterConfig, RouterTensors
from mmscale.nn.sizes import Layers, ShrunkTo, Width


class MoeConfig(RouterConfig, MlpBase):
    """Feed-forward block with routed experts."""

    has_experts: ClassVar[bool] = True
    training_fields: ClassVar[tuple[str, ...]] = (
        "balance",
        "balance_coefficient",
        "balance_groups",
        "z_coefficient",
        "jitter",
        "expert_dropout",
        "capacity_factor",
    )
    kind: Literal["moe"] = "moe"
    expert_dim: Width
    """F of each routed expert; a multiple of 8 for the grouped CUDA kernel."""
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training between the projections of routed experts (Switch, fine-tuning: 0.4)."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """In training, an expert computes at most ``ceil(capacity_factor * rows * experts_per_token / num_experts)`` rows
    of a microbatch, the first ones (Switch: 1.25). Choices beyond that contribute nothing, and the step report counts
    them; the other weights are unchanged. Results then depend on the microbatches. Null: no limit."""
    activation: Activation = Activation.SILU
    """Non-linearity of the gated experts."""
    shared_dim: int = Field(default=0, ge=0, le=1 << 20)
    """F of the shared expert, which every token uses in addition; 0 for none. Several shared experts are one of their
    summed width."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a sigmoid gate per token (Qwen-MoE)."""
    every: Annotated[Layers, ShrunkTo(2, counts_blocks=True)] = 1
    """Every n-th block has experts: blocks n-1, 2n-1, ... (0-based); the others use ``dense``."""
    dense_first: Annotated[int, Field(ge=0, le=1 << 16), ShrunkTo(1, counts_blocks=True)] = 0
    """Number of first blocks without experts, whatever ``every`` is; they use ``dense`` (DeepSeek-V3: 3)."""
    dense: DenseMlpConfig | None = None
    """Feed-forward of the blocks without experts. Required if ``every`` is above 1 or ``dense_first`` above 0, else
    null."""

    @model_validator(mode="after")
    def _consistent(self) -> MoeConfig:
        if self.shared_gate and not self.shared_dim:
            raise ValueError("shared_gate: there is no shared expert; set shared_dim")
        if (self.every > 1 or self.dense_first > 0) != (self.dense is not None):
            raise ValueError(
                f"every={self.every}, dense_first={self.dense_first}: dense must be set if and only if every is above "
                "1 or dense_first above 0"
            )
        return self

    def for_block(self, number: int) -> MoeConfig | DenseMlpConfig:
        """Return the feed-forward of the 0-based block ``number``: ``self``, or ``dense`` in blocks without experts."""
        has_experts = number >= self.dense_first and (number + 1) % self.every == 0
        return self if self.dense is None or has_experts else self.dense

    def build(self, dim: int) -> nn.Module:
        return MoeMlp(dim, self)

    def flops_per_row(self, dim: int) -> int:
        """Return the forward operations of the router and of the shared expert."""
        return 2 * dim * self.num_experts + 6 * dim * self.shared_dim + (2 * dim if self.shared_gate else 0)

    def flops_per_routed_row(self, dim: int) -> int:
        """Return the forward operations of the experts that a row chooses; with ``capacity_factor`` an upper bound."""
        return 6 * dim * self.expert_dim * self.experts_per_token

    def last_product(self, dim: int) -> int:
        return 2 * dim * self.shared_dim if self.shared_dim and not self.shared_gate else 0


class MoeMlp(nn.Module):
    """Routed experts plus, optionally, a shared one.

    Source: Shazeer et al. 2017; Gale et al. 2022, "MegaBlocks" (dropless); Dai et al. 2024, "DeepSeekMoE" (shared).
    """

    def __init__(self, dim: int, config: MoeConfig) -> None:
        super().__init__()
        self.gate = Router(dim, config)
        self.experts = Experts(dim, config.num_experts, config.experts_per_token, config.expert_dim, config.activation)
        if config.shared_dim:
            shared = DenseMlpConfig(hidden_dim=config.shared_dim, activation=config.activation)
            self.shared_expert = Mlp(dim, shared)
            if config.shared_gate:
                self.shared_expert_gate = nn.Linear(dim, 1, bias=False)
        self.config = config

    def forward(
        self, hidden: Float[Tensor, "T D"], rows: RoutedRows, dropout: Dropout | None = None
    ) -> tuple[Float[Tensor, "T D"], RouterTensors]:
        """Return the output rows and the router's sums.

        Rows that are not ``rows.valid`` use no routed expert and do not count in the sums.

        Args:
            hidden: Rows.
            rows: Their properties.
            dropout: Random numbers of the rows for ``expert_dropout`` and ``jitter``; None for neither.
        """
        config = self.config
        weights, chosen, sums = self.gate(hidden, rows, dropout)
        capacity = None
        if config.capacity_factor is not None and self.training:
            num_valid = len(chosen) if rows.index is None else len(rows.index)
            capacity = math.ceil(config.capacity_factor * num_valid * config.experts_per_token / config.num_experts)
        dispatch = Dispatch.of(chosen, config.num_experts, rows.index, capacity)
        if capacity is not None:
            sums = sums._replace(dropped=sums.load.sum() - len(dispatch.choices))
        masks = dispatch.masks(dropout, config.expert_dropout, chosen) if dropout and config.expert_dropout else None
        outputs = self.experts(dispatch.gather(hidden), dispatch.weights(weights), dispatch.counts, masks)
        mixed = dispatch.sum(outputs)
        if config.shared_dim:
            shared = self.shared_expert(hidden)
            if config.shared_gate:
                shared = shared * self.shared_expert_gate(hidden).sigmoid()
            mixed = mixed + shared
        return mixed, sums
