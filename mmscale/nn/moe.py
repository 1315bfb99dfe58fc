"""Mixture of experts: a router and stacked expert weights, without dropped tokens.

    rows --router--> A experts each --sort by expert--> per-expert projections --un-sort, weigh, sum--> rows

All experts share one parameter per matrix. A rank without rows for an expert therefore still runs the same modules as
the other ranks.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.block import ACTIVATIONS, Activation, DenseMlpConfig, Mlp, MlpBase
from mmscale.nn.router import RoutedRows, Router, RouterConfig, RouterTensors
from mmscale.nn.sizes import Layers, ShrunkTo, Width


class MoeConfig(RouterConfig, MlpBase):
    """Feed-forward block with routed experts."""

    has_experts: ClassVar[bool] = True
    training_fields: ClassVar[tuple[str, ...]] = ("balance", "balance_coefficient", "balance_groups", "z_coefficient")
    kind: Literal["moe"] = "moe"
    expert_dim: Width
    """F of each routed expert; a multiple of 8 for the grouped CUDA kernel."""
    activation: Activation = Activation.SILU
    """Non-linearity of the gated experts."""
    shared_dim: int = Field(default=0, ge=0, le=1 << 20)
    """F of the shared expert, which every token uses in addition; 0 for none. Several shared experts are one of their
    summed width."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a sigmoid gate per token (Qwen-MoE)."""
    every: Annotated[Layers, ShrunkTo(2)] = 1
    """Every n-th block has experts: blocks n-1, 2n-1, ... (0-based); the others use ``dense``."""
    dense_first: int = Field(default=0, ge=0, le=1 << 16)
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
        """Return the forward operations of one row: its experts, the shared expert, and the router."""
        routed = 6 * dim * self.expert_dim * self.experts_per_token
        shared = 6 * dim * self.shared_dim + (2 * dim if self.shared_gate else 0)
        return routed + shared + 2 * dim * self.num_experts

    def last_product(self, dim: int) -> int:
        return 2 * dim * self.shared_dim if self.shared_dim and not self.shared_gate else 0


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

    def forward(self, hidden: Float[Tensor, "T D"], rows: RoutedRows) -> tuple[Float[Tensor, "T D"], RouterTensors]:
        """Return the output rows and the router's sums.

        Rows that are not ``rows.valid`` have an output but do not count in the sums.
        """
        weights, chosen, sums = self.gate(hidden, rows)
        copies = self.config.experts_per_token
        experts, order = chosen.flatten().sort(stable=True)
        # Repeat, then permute: both have deterministic gradients. Gathering repeated rows has not (CUDA atomics).
        copied = hidden.repeat_interleave(copies, 0).index_select(0, order)
        outputs = self.experts(copied, experts).index_select(0, order.argsort())  # back in (T, A) order
        mixed = (outputs.view(-1, copies, hidden.shape[-1]) * weights.unsqueeze(-1)).sum(1)
        if self.config.shared_dim:
            shared = self.shared_expert(hidden)
            if self.config.shared_gate:
                shared = shared * self.shared_expert_gate(hidden).sigmoid()
            mixed = mixed + shared
        return mixed, sums
