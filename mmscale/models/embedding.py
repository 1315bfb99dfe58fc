"""The token embedding: one table, or one and a second for new tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


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
