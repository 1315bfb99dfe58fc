"""Self- and cross-attention over packed rows: projections, per-head norms, positions, caches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from data_pipeline.batch import AttentionSegments, BranchedSegments, Segments
from data_pipeline.io.strict import StrictConfig
from mmscale.nn.attention_backends import Backend, varlen_attention
from mmscale.nn.norms import NormConfig, build_norm
from mmscale.nn.rope import Rotation, rotate
from mmscale.nn.sizes import Heads


class QkNorm(str, Enum):
    """Normalisation of queries and keys before the dot product."""

    NONE = "none"
    HEAD = "head"
    """Over each head's channels (Llama 3.2 Vision's cross-attention, Qwen3)."""
    FULL = "full"
    """Over all heads' channels at once (OLMoE, OLMo 2, InternViT)."""


class AttentionConfig(StrictConfig):
    """Shape of an attention layer; its width comes from the block around it."""

    num_heads: Heads
    """H, query heads."""
    num_kv_heads: Heads | None = None
    """G, key and value heads; must divide ``num_heads``. Null: as many as query heads."""
    head_dim: Heads | None = None
    """K, channels of a head. Null: width divided by ``num_heads``."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    out_bias: bool = False
    """Bias on the output projection."""
    qk_norm: QkNorm = QkNorm.NONE
    """Normalise queries and keys: ``none``, per ``head``, or over the ``full`` projection."""
    qk_norm_config: NormConfig | None = None
    """Kind and epsilon of that norm. Null: as the norms of the block."""

    @model_validator(mode="after")
    def _divisible(self) -> AttentionConfig:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def resolved_head_dim(self, dim: int) -> int:
        """K in a block of width ``dim``.

        Raises:
            ValueError: ``num_heads`` does not divide ``dim`` and no ``head_dim`` is set.
        """
        if self.head_dim is None and dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads}: must divide the width {dim}, or set head_dim")
        return self.head_dim or dim // self.num_heads

    def flops_per_row(self, dim: int) -> int:
        """Forward operations of the four projections of one row of self-attention."""
        return 4 * dim * self.resolved_head_dim(dim) * (self.num_heads + self.kv_heads)

    def flops_per_pair(self, dim: int) -> int:
        """Forward operations of scores and mixing for one query and one key."""
        return 4 * self.num_heads * self.resolved_head_dim(dim)


@dataclass
class LayerCache:
    """Keys and values of one layer for S sequences, ``(S, capacity, G, K)``; filled in place.

    ``rows`` are the buffer rows (over ``S * capacity``) of the tokens being written now, ``visible`` those of all
    tokens so far, sequence after sequence, and ``segments`` partitions ``visible`` into sequences.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    visible: Tensor
    segments: Segments

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new rows; returns keys and values of all rows so far, packed."""
        stores = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        stores[0].index_copy_(0, self.rows, k)
        stores[1].index_copy_(0, self.rows, v)
        return stores[0].index_select(0, self.visible), stores[1].index_select(0, self.visible)


class _Projections(nn.Module):
    """What both kinds of attention share: four projections and two norms. Has no forward of its own."""

    def __init__(self, dim: int, source_dim: int, config: AttentionConfig, norm: NormConfig, backend: Backend) -> None:
        super().__init__()
        self.head_dim = config.resolved_head_dim(dim)
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        query_dim, key_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(source_dim, key_dim, bias=config.qkv_bias)
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

    def keys(self, source: Float[Tensor, "A Ds"]) -> Float[Tensor, "A G K"]:
        rows = self.k_proj(source)
        if self.qk_norm is QkNorm.FULL:
            rows = self.k_norm(rows)
        heads = rows.view(-1, self.num_kv_heads, self.head_dim)
        return self.k_norm(heads) if self.qk_norm is QkNorm.HEAD else heads

    def values(self, source: Float[Tensor, "A Ds"]) -> Float[Tensor, "A G K"]:
        return self.v_proj(source).view(-1, self.num_kv_heads, self.head_dim)


class SelfAttention(_Projections):
    """Grouped-query attention within segments, or within the branches of documents.

    Keys and values of what branches share are computed once, and gathered in front of every branch.

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
    ) -> Float[Tensor, "T D"]:
        """``cache`` is extended in place by the keys and values of these rows."""
        q, k, v = self.queries(hidden), self.keys(hidden), self.values(hidden)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if isinstance(segments, BranchedSegments):
            queries, keys = segments.queries, segments.keys
            k, v = k.index_select(0, segments.rows), v.index_select(0, segments.rows)
        else:
            queries = keys = segments
        if cache is not None:
            k, v = cache.extend(k, v)
            keys = cache.segments
        mixed = varlen_attention(q, k, v, queries, keys, self.causal, self.backend)
        return self.o_proj(mixed.flatten(1))


class CrossAttention(_Projections):
    """Queries from text, keys and values from image features; no positions.

    Source: Llama 3 (arXiv 2407.21783, section 7.1).
    """

    def project_source(self, source: Float[Tensor, "A Ds"]) -> tuple[Tensor, Tensor]:
        """Keys and values ``(A, G, K)``, worth caching while decoding."""
        return self.keys(source), self.values(source)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        keys: Float[Tensor, "A G K"],
        values: Float[Tensor, "A G K"],
        span_tokens: Segments,
        span_keys: Segments,
    ) -> Float[Tensor, "T D"]:
        """Rows of a span without keys get ``o_proj`` of zeros."""
        q = self.queries(hidden)
        mixed = varlen_attention(q, keys, values, span_tokens, span_keys, causal=False, backend=self.backend)
        return self.o_proj(mixed.flatten(1))
