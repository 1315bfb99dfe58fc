"""A transformer block and its parts: norms, self- and cross-attention, feed-forward. Text and image towers share it.

Kernels are in ``attention_backends.py``, experts in ``moe.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import AttentionSegments, BranchedSegments, Segments
from data_pipeline.io.strict import StrictConfig
from mmscale.nn.attention_backends import Backend, step_attention, varlen_attention
from mmscale.nn.dropout import Dropout, SubLayer
from mmscale.nn.flops import Product, attention_product, linear_product
from mmscale.nn.layer_cache import LayerCache
from mmscale.nn.rms_norm import RmsNorm
from mmscale.nn.rope import Rotation, rotate
from mmscale.nn.router import RoutedRows, RouterTensors
from mmscale.nn.sizes import Epsilon, Heads, Width


class NormKind(str, Enum):
    """Kind of normalisation."""

    RMS = "rmsnorm"
    LAYER = "layernorm"


class NormConfig(StrictConfig):
    """A normalisation over the last dimension."""

    kind: NormKind = NormKind.RMS
    """``rmsnorm`` (Llama, Qwen, Mistral) or ``layernorm`` (CLIP, SigLIP, Persimmon)."""
    eps: Epsilon = 1e-5
    """Added to the mean square (``rmsnorm``) or the variance (``layernorm``) before the square root."""


def build_norm(config: NormConfig, dim: int) -> nn.Module:
    """Return a norm over ``dim`` channels.

    Source: Ba et al. 2016, "Layer normalization"; for the other kind see ``RmsNorm``.
    """
    return (RmsNorm if config.kind is NormKind.RMS else nn.LayerNorm)(dim, eps=config.eps)


class QkNorm(str, Enum):
    """Normalisation of queries and keys before the dot product."""

    NONE = "none"
    HEAD = "head"
    """Over the channels of each head (Llama 3.2 Vision's cross-attention, Qwen3)."""
    FULL = "full"
    """Over the channels of all heads together (OLMoE, OLMo 2, InternViT)."""


class AttentionConfig(StrictConfig):
    """Shape of an attention layer; its width comes from the block around it."""

    num_heads: Heads
    """H, query heads."""
    num_kv_heads: Heads | None = None
    """G, key and value heads; must divide ``num_heads``. Null: ``num_heads``."""
    head_dim: Heads | None = None
    """K, channels of a head. Null: width / ``num_heads``, which must then divide the width."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    key_bias: bool = True
    """Whether ``qkv_bias`` includes the key projection (Whisper: false)."""
    out_bias: bool = False
    """Bias on the output projection."""
    qk_norm: QkNorm = QkNorm.NONE
    """Norm of queries and keys: ``none``, per ``head``, or over the ``full`` projection."""
    qk_norm_config: NormConfig | None = None
    """Kind and epsilon of the ``qk_norm``. Null: those of the block's norms."""

    @model_validator(mode="after")
    def _divisible(self) -> AttentionConfig:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        if not (self.key_bias or self.qkv_bias):
            raise ValueError("key_bias=false: without qkv_bias there is none to leave out; set qkv_bias=true")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def resolved_head_dim(self, dim: int) -> int:
        """Return K in a block of width ``dim``.

        Raises:
            ValueError: ``num_heads`` does not divide ``dim`` and no ``head_dim`` is set.
        """
        if self.head_dim is None and dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide the width {dim}, or set head_dim")
        return self.head_dim or dim // self.num_heads

    def flops_per_row(self, dim: int) -> int:
        """Return the forward operations of the four projections for one row of self-attention."""
        return 4 * dim * self.resolved_head_dim(dim) * (self.num_heads + self.kv_heads)

    def flops_per_pair(self, dim: int) -> int:
        """Return the forward operations of scores and mixing for one query and one key."""
        return 4 * self.num_heads * self.resolved_head_dim(dim)


class _Projections(nn.Module):
    """Projections and query/key norms of self- and cross-attention. Has no ``forward``."""

    def __init__(self, dim: int, source_dim: int, config: AttentionConfig, norm: NormConfig, backend: Backend) -> None:
        super().__init__()
        self.head_dim = config.resolved_head_dim(dim)
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        query_dim, key_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(source_dim, key_dim, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(source_dim, key_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_dim, dim, bias=config.out_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm is not QkNorm.NONE:
            full = config.qk_norm is QkNorm.FULL
            norm = config.qk_norm_config or norm
            self.q_norm = build_norm(norm, query_dim if full else self.head_dim)
            self.k_norm = build_norm(norm, key_dim if full else self.head_dim)
        self.backend: Backend = backend

    def queries(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T H K"]:
        rows = self.q_proj(hidden)
        if self.qk_norm is QkNorm.FULL:
            rows = self.q_norm(rows)
        heads = rows.view(-1, self.num_heads, self.head_dim)
        return self.q_norm(heads) if self.qk_norm is QkNorm.HEAD else heads

    def keys_and_values(self, source: Float[Tensor, "A Ds"]) -> tuple[Float[Tensor, "A G K"], Float[Tensor, "A G K"]]:
        rows = self.k_proj(source)
        if self.qk_norm is QkNorm.FULL:
            rows = self.k_norm(rows)
        keys = rows.view(-1, self.num_kv_heads, self.head_dim)
        if self.qk_norm is QkNorm.HEAD:
            keys = self.k_norm(keys)
        return keys, self.v_proj(source).view(-1, self.num_kv_heads, self.head_dim)


class SelfAttention(_Projections):
    """Grouped-query attention within segments, or within the branches of documents.

    Keys and values of the rows that branches share are computed once and gathered for every branch.

    Source: Vaswani et al. 2017; Ainslie et al. 2023 (GQA); Molmo (arXiv 2409.17146, section 3) for branches.
    """

    def __init__(self, dim: int, config: AttentionConfig, norm: NormConfig, backend: Backend, causal: bool) -> None:
        super().__init__(dim, dim, config, norm, backend)
        self.causal = causal

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        rotation: Rotation | None,
        segments: AttentionSegments,
        cache: LayerCache | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Tensor, "T D"]:
        """Return the output rows. Extends ``cache`` in place by the keys and values of these rows."""
        q = self.queries(hidden)
        k, v = self.keys_and_values(hidden)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if isinstance(segments, BranchedSegments):
            queries, keys = segments.queries, segments.keys
            k, v = k.index_select(0, segments.key_tokens), v.index_select(0, segments.key_tokens)
        else:
            queries = keys = segments
        if cache is not None:
            cache.write(k, v)
            if cache.rows.is_step and self.backend == "sdpa":
                return self.o_proj(step_attention(q, *cache.padded(), cache.rows.mask).flatten(1))
            (k, v), keys = cache.packed(), cache.rows.segments
        mixed = varlen_attention(q, k, v, queries, keys, self.causal, self.backend, dropout)
        return self.o_proj(mixed.flatten(1))


class CrossAttention(_Projections):
    """Attention with queries from text, keys and values from image features, and no positions.

    The caller computes the keys and values (``keys_and_values``), so that it can cache them during generation.

    Source: Llama 3 (arXiv 2407.21783, section 7).
    """

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        keys: Float[Tensor, "A G K"],
        values: Float[Tensor, "A G K"],
        span_tokens: Segments,
        span_keys: Segments,
    ) -> Float[Tensor, "T D"]:
        """Return the output rows; for a span without keys they are ``o_proj`` of zeros."""
        q = self.queries(hidden)
        mixed = varlen_attention(q, keys, values, span_tokens, span_keys, causal=False, backend=self.backend)
        return self.o_proj(mixed.flatten(1))


class Activation(str, Enum):
    """Elementwise non-linearity."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    QUICK_GELU = "quick_gelu"
    RELU_SQUARED = "relu_squared"


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: _gelu_tanh,
    Activation.QUICK_GELU: _quick_gelu,
    Activation.RELU_SQUARED: _relu_squared,
}


class MlpBase(StrictConfig, ABC):
    """A kind of feed-forward: ``DenseMlpConfig``, or ``MoeConfig`` in ``moe.py``. A kind has the field ``kind``."""

    has_experts: ClassVar[bool] = False
    """Whether the module is called with ``(hidden, RoutedRows, Dropout)`` and returns ``(output, RouterTensors)``."""
    training_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that change the training only, not the output of a trained model."""

    @abstractmethod
    def for_block(self, number: int) -> MlpBase:
        """Return the feed-forward of the 0-based block ``number``."""

    @abstractmethod
    def build(self, dim: int) -> nn.Module:
        """Return the module for a stream of width ``dim``."""

    @abstractmethod
    def flops_per_row(self, dim: int) -> int:
        """Return the forward operations of one row, without those of routed experts."""

    def flops_per_routed_row(self, dim: int) -> int:
        """Return the forward operations of routed experts for one row that uses them; 0 without routed experts."""
        del dim
        return 0

    @abstractmethod
    def last_product(self, dim: int) -> int:
        """Return the forward operations of one row in the last product; 0 if the backward pass needs its output."""


class DenseMlpConfig(MlpBase):
    """Feed-forward without experts."""

    kind: Literal["dense"] = "dense"
    hidden_dim: Width
    """F, channels between the two projections."""
    activation: Activation = Activation.SILU
    """Non-linearity between the projections."""
    gated: bool = True
    """Multiply the activation by a second projection (SwiGLU and its variants)."""
    bias: bool = False
    """Biases on all projections."""

    def for_block(self, number: int) -> DenseMlpConfig:
        return self

    def build(self, dim: int) -> nn.Module:
        return Mlp(dim, self)

    def flops_per_row(self, dim: int) -> int:
        return 2 * dim * self.hidden_dim * (3 if self.gated else 2)

    def last_product(self, dim: int) -> int:
        return 2 * dim * self.hidden_dim


class Mlp(nn.Module):
    """``down(act(gate(x)) * up(x))`` if gated, else ``down(act(up(x)))``.

    Args:
        dim: Input channels.
        config: Hidden channels, activation, gating and biases.
        out_dim: Output channels; None: ``dim``.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """

    def __init__(self, dim: int, config: DenseMlpConfig, out_dim: int | None = None) -> None:
        super().__init__()
        if config.gated:
            self.gate_proj = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.up_proj = nn.Linear(dim, config.hidden_dim, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden_dim, out_dim or dim, bias=config.bias)
        self.activate = ACTIVATIONS[config.activation]
        self.gated = config.gated

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... out_dim"]:
        if self.gated:
            return self.down_proj(self.activate(self.gate_proj(hidden)) * self.up_proj(hidden))
        return self.down_proj(self.activate(self.up_proj(hidden)))


class NormPlacement(str, Enum):
    """Whether norms are applied to the input or to the output of a sub-layer."""

    PRE = "pre"
    """``x + f(norm(x))`` (Llama, CLIP)."""
    POST = "post"
    """``x + norm(f(x))`` (OLMo 2)."""


class LayerScale(nn.Module):
    """Multiplies a residual branch by a learned factor per channel.

    Source: Touvron et al. 2021, "Going deeper with image transformers", section 2.
    """

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), start))
        self.constant_init = {"weight": start}

    def forward(self, branch: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return branch * self.weight


class TanhGate(nn.Module):
    """Multiplies a residual branch by the tanh of one learned number.

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
        attention: Heads, biases, query/key norms.
        mlp: Feed-forward, dense or with experts.
        norm: Kind and epsilon of the two norms.
        backend: Attention kernel.
        causal: Whether a row attends only to itself and earlier rows.
        placement: Norms before or after the sub-layers.
        layer_scale: Initial value of the per-channel factors on both branches; None for no factors.
        gate: Initial value of a tanh gate on each branch, instead of ``layer_scale``; None for no gates.
    """

    def __init__(
        self,
        dim: int,
        attention: AttentionConfig,
        mlp: MlpBase,
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
        self.has_experts = mlp.has_experts
        self.placement = placement
        self.attention_scale = _scale(dim, layer_scale, gate)
        self.mlp_scale = _scale(dim, layer_scale, gate)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        rotation: Rotation | None,
        segments: AttentionSegments,
        rows: RoutedRows | None = None,
        cache: LayerCache | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Tensor, "T D"], RouterTensors | None]:
        """Return the residual stream and, with experts, the router's sums.

        Args:
            hidden: Residual stream.
            rotation: Rotary positions; None for none.
            segments: Rows that attend to each other.
            rows: Rows for the router; required with experts.
            cache: Keys and values of earlier rows; extended in place.
            dropout: Masks of this block; None for none.
        """
        pre = self.placement is NormPlacement.PRE
        branch = self.input_layernorm(hidden) if pre else hidden
        branch = self.self_attn(branch, rotation, segments, cache, dropout)
        branch = self.attention_scale(branch if pre else self.input_layernorm(branch))
        hidden = hidden + (branch if dropout is None else dropout(branch, SubLayer.ATTENTION))
        branch = self.post_attention_layernorm(hidden) if pre else hidden
        sums = None
        if self.has_experts:
            branch, sums = self.mlp(branch, rows, dropout)
        else:
            branch = self.mlp(branch)
        branch = self.mlp_scale(branch if pre else self.post_attention_layernorm(branch))
        return hidden + (branch if dropout is None else dropout(branch, SubLayer.FEED_FORWARD)), sums


def block_products(
    dim: int,
    attention: AttentionConfig,
    mlp: MlpBase,
    stream: str,
    *,
    pairs: str | None = None,
    learns: bool,
    flows: bool,
    ends_in_product: bool,
) -> list[Product]:
    """Return the operations of one block.

    Args:
        dim: Width of the residual stream.
        attention: As for ``TransformerBlock``.
        mlp: As for ``TransformerBlock``.
        stream: Prefix of the counts: the operations are per ``{stream}_rows`` and ``{stream}_pairs``. Those of routed
            experts are per ``routed_rows``.
        pairs: Name of the count of query-key pairs; None: ``{stream}_pairs``.
        learns: Whether the block's weights are trained.
        flows: Whether the backward pass computes the gradient of the block's input.
        ends_in_product: Whether the output of the last product is only added to the stream. Activation checkpointing
            then does not recompute it.
    """
    row, pair = attention.flops_per_row(dim) + mlp.flops_per_row(dim), attention.flops_per_pair(dim)
    again = row - (mlp.last_product(dim) if ends_in_product else 0)
    gradients, routed = 4 * (learns or flows), mlp.flops_per_routed_row(dim)
    products = [
        linear_product(f"{stream}_rows", row, weights=learns, inputs=flows, again=again),
        attention_product(pairs or f"{stream}_pairs", pair, gradients=gradients, again=pair),
    ]
    if routed:
        products.append(linear_product("routed_rows", routed, weights=learns, inputs=flows, again=routed))
    return products


def _scale(dim: int, layer_scale: float | None, gate: float | None) -> nn.Module:
    if gate is not None:
        return TanhGate(gate)
    return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
