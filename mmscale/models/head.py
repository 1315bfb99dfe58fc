"""The output projection: logits, or a loss that never holds them all."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.cross_entropy import linear_cross_entropy


class LanguageHead(nn.Module):
    """From hidden rows to the vocabulary.

    Args:
        vocab_size: V.
        dim: D.
        tied: The embedding's parameter to share, or None for one of its own.
    """

    def __init__(self, vocab_size: int, dim: int, tied: Tensor | None = None) -> None:
        super().__init__()
        if tied is None:
            tied = nn.Parameter(torch.empty(vocab_size, dim))
            nn.init.normal_(tied, std=0.02)
        self.weight = tied if isinstance(tied, nn.Parameter) else nn.Parameter(tied)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        labels: Int[Tensor, " T"] | None = None,
        loss_weights: Float[Tensor, " T"] | None = None,
        row_losses: Float[Tensor, " T"] | None = None,
    ) -> Tensor:
        """Logits ``(T, V)``; with ``labels`` and ``loss_weights`` the float32 sum of weighted cross-entropies.

        ``row_losses`` (zeros) receives the terms of that sum.
        """
        if labels is None or loss_weights is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, labels, loss_weights, row_losses)
