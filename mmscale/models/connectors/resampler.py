"""The resampler: learned queries attend to the patches of each crop. Their number depends on the size of the crop.

    queries (F, C) --norm, q_proj--+
    patches (P, C) --norm, k_proj, v_proj--> attention of each crop's queries over its patches --> norm, MLP --> (F, D)

Crops have different numbers of patches and stay packed. Crops without padding need no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Segments
from data_pipeline.media_spec import num_queries
from mmscale.models.connectors.projector import ProjectorBase
from mmscale.nn.attention_backends import varlen_attention
from mmscale.nn.block import ACTIVATIONS, Activation
from mmscale.nn.flops import Work
from mmscale.nn.host import to_device
from mmscale.nn.sizes import Heads, Side

NumQueries = Annotated[int, Field(ge=1, le=1 << 14)]


class ResamplerConfig(ProjectorBase):
    """Learned queries that attend to the patches of a crop, then a feed-forward (Aria)."""

    kind: Literal["resampler"] = "resampler"
    queries: tuple[tuple[Side, NumQueries], ...] = Field(min_length=1)
    """Pairs [side, features], ascending: a crop whose longer side has at most ``side`` patches becomes this many
    features, from as many of the queries. The model has as many queries as the last pair has features. Larger crops are
    bad samples."""
    num_heads: Heads
    """Heads of the attention; must divide the tower's channels."""

    @property
    def merge(self) -> int:
        """1: grids may have sides of any length."""
        return 1

    @property
    def learns_first(self) -> bool:
        return True

    @property
    def query_sizes(self) -> tuple[tuple[int, int], ...]:
        return self.queries

    @model_validator(mode="after")
    def _ascending(self) -> ResamplerConfig:
        sides, numbers = zip(*self.queries, strict=True)
        if list(sides) != sorted(set(sides)) or list(numbers) != sorted(numbers):
            raise ValueError(f"queries={[list(pair) for pair in self.queries]}: sides and numbers must ascend")
        return self

    def check(self, fixed_grid: tuple[int, int] | None) -> None:
        if fixed_grid is not None and max(fixed_grid) > self.queries[-1][0]:
            raise ValueError(
                f"connector.projector.queries: the largest crop has {self.queries[-1][0]} patches a side, the tower's "
                f"crops have {list(fixed_grid)}"
            )

    def check_width(self, feature_dim: int) -> None:
        if feature_dim % self.num_heads:
            raise ValueError(
                f"connector.projector.num_heads={self.num_heads}: must divide the {feature_dim} channels of the "
                "tower's features"
            )

    def build(self, feature_dim: int, dim: int) -> Resampler:
        return Resampler(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        square = 2 * feature_dim**2
        return [
            Work("passes", 2 * square * self.queries[-1][1], learned_queries=True),
            Work("feature_patches", 2 * square),
            Work("feature_patches", 2 * square),
            Work("query_pairs", 4 * feature_dim, attends=True, learned_queries=True),
            Work("features", 2 * square + 2 * feature_dim * dim + 2 * dim**2),
        ]


class MultiheadAttention(nn.Module):
    """Attention with biased projections, as in ``torch.nn.MultiheadAttention``, over packed segments.

    Args:
        dim: C, channels of queries, keys and values.
        num_heads: Number of heads; must divide C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.heads = (num_heads, dim // num_heads)

    def forward(
        self,
        query: Float[Tensor, "N C"],
        key: Float[Tensor, "P C"],
        value: Float[Tensor, "P C"],
        order: Tensor,
        queries: Segments,
        keys: Segments,
    ) -> Float[Tensor, "F_rows C"]:
        """Return one row for each index of ``order``, which repeats the rows of ``query``.

        ``queries`` partitions the indices of ``order``, and ``keys`` the rows of ``key`` and ``value``.
        """
        # Project before repeating. The gradient of F.embedding is deterministic, that of index_select is not (CUDA).
        q = F.embedding(order, self.q_proj(query)).unflatten(1, self.heads)
        k, v = self.k_proj(key).unflatten(1, self.heads), self.v_proj(value).unflatten(1, self.heads)
        # The projector has no choice of a kernel; sdpa has a fused one for every device and dtype.
        return self.o_proj(varlen_attention(q, k, v, queries, keys, causal=False, backend="sdpa").flatten(1))


class Resampler(nn.Module):
    """Maps a crop of any grid to a number of features that depends on its longer side.

    Source: Aria (arXiv 2410.05993), section 2.2, and its code, aria/model/projector.py.
    """

    def __init__(self, feature_dim: int, dim: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_embedding = nn.Parameter(torch.zeros(config.queries[-1][1], feature_dim))
        self.query_norm = nn.LayerNorm(feature_dim)
        self.key_norm = nn.LayerNorm(feature_dim)
        self.q_proj = nn.Linear(feature_dim, feature_dim, bias=False)
        self.k_proj = nn.Linear(feature_dim, feature_dim, bias=False)
        self.v_proj = nn.Linear(feature_dim, feature_dim, bias=False)
        self.attention = MultiheadAttention(feature_dim, config.num_heads)
        self.linear = nn.Linear(feature_dim, feature_dim)
        self.norm = nn.LayerNorm(feature_dim)
        self.fc1 = nn.Linear(feature_dim, dim, bias=False)
        self.activate = ACTIVATIONS[Activation.GELU_TANH]
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(
        self, features: Float[Tensor, "P feature_dim"], grids: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "F_rows D"]:
        """Return the features of each frame, item after item."""
        frames = [
            (height * width, num_queries(self.config.queries, (time, height, width)))
            for time, height, width in grids
            for _ in range(time)
        ]
        patches, numbers = zip(*frames, strict=True)
        order = to_device(np.concatenate([np.arange(number) for number in numbers]), features.device)
        keys = self.key_norm(features)
        rows = self.attention(
            self.q_proj(self.query_norm(self.query_embedding)),
            self.k_proj(keys),
            self.v_proj(keys),
            order,
            Segments.from_lengths(list(numbers)),
            Segments.from_lengths(list(patches)),
        )
        return self.fc2(self.activate(self.fc1(self.norm(self.linear(rows)))))
