"""One transformer block: attention and feed-forward on a residual stream. Text and image towers share it."""

from __future__ import annotations

from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data_pipeline.batch import AttentionSegments
from mmscale.nn.attention import AttentionConfig, LayerCache, SelfAttention
from mmscale.nn.attention_backends import Backend
from mmscale.nn.dropout import Branch, Dropout, drop
from mmscale.nn.flops import Product, attention_of, linear
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.norms import NormConfig, build_norm
from mmscale.nn.rope import Rotation


class NormPlacement(str, Enum):
    """Which side of a sub-layer is normalised."""

    PRE = "pre"
    """``x + f(norm(x))`` (Llama, CLIP)."""
    POST = "post"
    """``x + norm(f(x))`` (OLMo 2)."""


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch.

    Source: Touvron et al. 2021, "Going deeper with image transformers", section 2.
    """

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), start))
        self.constant_init = {"weight": start}

    def forward(self, branch: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return branch * self.weight


class TanhGate(nn.Module):
    """One learned number on a residual branch, through tanh.

    Source: Flamingo (arXiv 2204.14198), section 2.2.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), start))
        self.constant_init = {"weight": start}

    def forward(self, branch: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return branch * self.weight.tanh()


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on a residual branch.

    Args:
        dim: Width of the residual stream.
        attention: Heads, biases, per-head norms.
        mlp: Dense or with experts.
        norm: Kind of the two norms.
        backend: Attention kernel.
        causal: Rows see earlier rows only.
        placement: Norms before or after the sub-layers.
        layer_scale: Start of the per-channel factors on both branches; None for none.
        gate: Start of tanh gates on both branches, in the place of ``layer_scale``; None for none.
    """

    def __init__(
        self,
        dim: int,
        attention: AttentionConfig,
        mlp: DenseMlpConfig | MoeConfig,
        norm: NormConfig,
        backend: Backend,
        *,
        causal: bool,
        placement: NormPlacement = NormPlacement.PRE,
        layer_scale: float | None = None,
        gate: float | None = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = build_norm(norm, dim)
        self.self_attn = SelfAttention(dim, attention, norm, backend, causal)
        self.post_attention_layernorm = build_norm(norm, dim)
        self.mlp = mlp.build(dim)
        self.has_experts = isinstance(mlp, MoeConfig)
        self.placement = placement
        self.attention_scale = _scale(dim, layer_scale, gate)
        self.mlp_scale = _scale(dim, layer_scale, gate)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        rotation: Rotation | None,
        segments: AttentionSegments,
        valid: Bool[Tensor, " T"] | None = None,
        cache: LayerCache | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "2"] | None]:
        """Returns the stream and, with experts, (balance loss, router z loss) over ``valid`` rows."""
        pre = self.placement is NormPlacement.PRE
        branch = self.input_layernorm(hidden) if pre else hidden
        branch = self.self_attn(branch, rotation, segments, cache)
        branch = self.attention_scale(branch if pre else self.input_layernorm(branch))
        hidden = hidden + drop(branch, dropout, Branch.ATTENTION)
        branch = self.post_attention_layernorm(hidden) if pre else hidden
        router_losses = None
        if self.has_experts:
            branch, router_losses = self.mlp(branch, valid)
        else:
            branch = self.mlp(branch)
        branch = self.mlp_scale(branch if pre else self.post_attention_layernorm(branch))
        return hidden + drop(branch, dropout, Branch.FEED_FORWARD), router_losses


def block_products(
    dim: int,
    attention: AttentionConfig,
    mlp: DenseMlpConfig | MoeConfig,
    stream: str,
    *,
    learns: bool,
    flows: bool,
    ends_in_product: bool,
) -> list[Product]:
    """The operations of one block.

    Args:
        dim: Width of the residual stream.
        attention: As for ``TransformerBlock``.
        mlp: As for ``TransformerBlock``.
        stream: The counts ``{stream}_rows`` and ``{stream}_pairs`` of the batch are those of the block.
        learns: Whether the block's weights learn.
        flows: Whether a gradient flows through the block into what is before it.
        ends_in_product: Whether the last product's output is only added to the stream. Activation checkpointing then
            does not compute it again.
    """
    row, pair = attention.flops_per_row(dim) + mlp.flops_per_row(dim), attention.flops_per_pair(dim)
    again = row - (mlp.last_product(dim) if ends_in_product else 0)
    gradients = 4 * (learns or flows)
    return [
        linear(f"{stream}_rows", row, weights=learns, inputs=flows, again=again),
        attention_of(f"{stream}_pairs", pair, gradients=gradients, again=pair),
    ]


def _scale(dim: int, layer_scale: float | None, gate: float | None) -> nn.Module:
    if gate is not None:
        return TanhGate(gate)
    return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
