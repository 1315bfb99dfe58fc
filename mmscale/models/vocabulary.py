"""Rows of the vocabulary at both ends of a decoder: the token embedding, and the head with its loss.

Both hold the rows of new tokens as a parameter of their own, and a tied head holds the embedding's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.cross_entropy import SoftTarget, ZLoss, linear_cross_entropy


class TokenEmbedding(nn.Embedding):
    """A row for every token id; rows of new tokens are a parameter of their own and learn while the table is frozen.

    A mask over the gradient of one table would do for that but not for weight decay, moments and their memory.

    Args:
        vocab_size: V, rows of ``weight``.
        dim: D.
        extra_rows: Rows of ``extra_weight``, of the ids from V on.
    """

    extra_weight: nn.Parameter | None

    def __init__(self, vocab_size: int, dim: int, extra_rows: int = 0) -> None:
        super().__init__(vocab_size, dim)
        extra = nn.Parameter(torch.empty(extra_rows, dim).normal_(std=0.02)) if extra_rows else None
        self.register_parameter("extra_weight", extra)

    def forward(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Bit for bit the rows of both tables joined; both are read whatever the ids are, as ZeRO-3 needs."""
        if self.extra_weight is None:
            return super().forward(ids)
        new = ids >= self.num_embeddings
        known = F.embedding(ids.masked_fill(new, 0), self.weight)
        extra = F.embedding((ids - self.num_embeddings).clamp(min=0), self.extra_weight)
        return torch.where(new.unsqueeze(1), extra, known)


class LanguageHead(nn.Module):
    """From hidden rows to the vocabulary.

    Args:
        vocab_size: V, rows of ``weight``.
        dim: D.
        tied: The embedding whose parameters to share, or None for some of its own.
        extra_rows: Rows of ``extra_weight``, of the ids from V on; those of the embedding, or 0.
    """

    extra_weight: nn.Parameter | None

    def __init__(self, vocab_size: int, dim: int, tied: TokenEmbedding | None = None, extra_rows: int = 0) -> None:
        super().__init__()
        extra = None
        if tied is not None:
            self.weight = tied.weight
            extra = tied.extra_weight if extra_rows else None
        else:
            self.weight = nn.Parameter(torch.empty(vocab_size, dim).normal_(std=0.02))
            extra = nn.Parameter(torch.empty(extra_rows, dim).normal_(std=0.02)) if extra_rows else None
        self.register_parameter("extra_weight", extra)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        labels: Int[Tensor, " T"] | None = None,
        loss_weights: Float[Tensor, " T"] | None = None,
        row_losses: Float[Tensor, " T"] | None = None,
        z_loss: ZLoss | None = None,
        soft_targets: Sequence[SoftTarget] = (),
    ) -> Tensor:
        """Logits ``(T, V)``, extra rows included; with labels and weights the float32 sum of weighted cross-entropies.

        ``row_losses`` (zeros) receives the terms of that sum; ``z_loss`` is added to it; ``soft_targets`` take shares.
        """
        if labels is None or loss_weights is None:
            logits = F.linear(hidden, self.weight)
            extra = self.extra_weight
            return logits if extra is None else torch.cat([logits, F.linear(hidden, extra)], dim=-1)
        return linear_cross_entropy(
            hidden, self.weight, labels, loss_weights, row_losses, self.extra_weight, z_loss, soft_targets
        )
