"""The attention-pooling projector: each square of patches becomes one feature by attention over its patches.

The query is the mean of the square's patches. A feed-forward maps the result to the decoder's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.models.connectors.projector import ProjectorBase, merge_order
from mmscale.nn.block import DenseMlpConfig, Mlp
from mmscale.nn.flops import Work
from mmscale.nn.host import to_device
from mmscale.nn.sizes import Heads, Side


class AttentionPoolConfig(ProjectorBase):
    """Attention of the mean of a square of patches over these patches, then a feed-forward (Molmo)."""

    kind: Literal["attention_pool"] = "attention_pool"
    merge: Side = 2
    """Side of the square of patches that becomes one feature."""
    num_heads: Heads
    """Heads of the pooling attention; its projections have biases."""
    head_dim: Heads
    """Channels of a head; the pooled feature has ``num_heads * head_dim`` channels."""
    mlp: DenseMlpConfig
    """Feed-forward from the pooled channels to the decoder's width."""

    def build(self, feature_dim: int, dim: int) -> AttentionPool:
        return AttentionPool(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        pooled, hidden = self.num_heads * self.head_dim, self.mlp.hidden_dim
        return [
            Work("pooled_pairs", 4 * pooled, attends=True),
            Work("features", 2 * feature_dim * pooled * (1 + 2 * self.merge**2)),
            Work("features", 2 * pooled**2),
            Work("features", 2 * hidden * pooled * (1 + self.mlp.gated)),
            Work("features", 2 * hidden * dim),
        ]


class AttentionPool(nn.Module):
    """Multi-head attention with one query per square, then a feed-forward to the decoder's width.

    Does not use an attention kernel: the few scores of a square need little memory, and kernels limit the number of
    sequences in a call, which would be the number of squares.

    Source: Molmo (arXiv 2409.17146), section 2, and its code: olmo/model.py and olmo/image_vit.py.
    """

    def __init__(self, feature_dim: int, dim: int, config: AttentionPoolConfig) -> None:
        super().__init__()
        self.config = config
        pooled = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(feature_dim, pooled)
        self.k_proj = nn.Linear(feature_dim, pooled)
        self.v_proj = nn.Linear(feature_dim, pooled)
        self.o_proj = nn.Linear(pooled, pooled)
        self.mlp = Mlp(pooled, config.mlp, dim)

    def forward(
        self, features: Float[Tensor, "P feature_dim"], grids: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "F_rows D"]:
        """Return ``P / merge**2`` rows, item after item."""
        order = to_device(merge_order(grids, self.config.merge), features.device)
        squares = features.index_select(0, order).view(-1, self.config.merge**2, features.shape[1])
        heads = (self.config.num_heads, self.config.head_dim)
        q = self.q_proj(squares.mean(1)).unflatten(-1, heads)  # (F_rows, H, K)
        # Keys and values: (F_rows, merge**2, H, K).
        k, v = self.k_proj(squares).unflatten(-1, heads), self.v_proj(squares).unflatten(-1, heads)
        scores = torch.einsum("fhk,fphk->fhp", q * self.config.head_dim**-0.5, k)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        mixed = torch.einsum("fhp,fphk->fhk", weights, v)
        return self.mlp(self.o_proj(mixed.flatten(1)))
