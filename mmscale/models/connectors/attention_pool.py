"""A square of patches to one feature: its mean asks, its patches answer, and a feed-forward widens the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.models.connector_config import AttentionPoolConfig
from mmscale.models.connectors.projector import merge_order
from mmscale.nn.mlp import Mlp


class AttentionPool(nn.Module):
    """Multi-head attention with one query a square, then a feed-forward to the decoder's width.

    The attention is written out: a few scores a square take less memory than any kernel's bookkeeping, and kernels
    have a limit on the number of sequences in a call, which here would be squares.

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
        """``P / merge**2`` rows, item after item."""
        order = torch.from_numpy(merge_order(grids, self.config.merge)).to(features.device)
        squares = features.index_select(0, order).view(-1, self.config.merge**2, features.shape[1])
        heads = (self.config.num_heads, self.config.head_dim)
        q = self.q_proj(squares.mean(1)).unflatten(-1, heads)  # (F, H, K)
        k, v = self.k_proj(squares).unflatten(-1, heads), self.v_proj(squares).unflatten(-1, heads)  # (F, 4, H, K)
        scores = torch.einsum("fhk,fphk->fhp", q * self.config.head_dim**-0.5, k)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        mixed = torch.einsum("fhp,fphk->fhk", weights, v)
        return self.mlp(self.o_proj(mixed.flatten(1)))
