"""The token embedding and the language head with its loss.

Both keep the rows of extra tokens in a separate parameter. A tied head shares the embedding's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.cross_entropy import SoftTarget, ZLoss, linear_cross_entropy


class TokenEmbedding(nn.Embedding):
    """Token embedding with the rows of extra tokens in a separate parameter, trainable while the table is frozen.

    Masking the gradient of one table would not be enough: weight decay would still change the frozen rows, and the
    optimizer would still allocate their moments.

    Args:
        vocab_size: V, rows of ``weight``.
        dim: D.
        extra_rows: Rows of ``extra_weight``, for ids V, V + 1, ...
    """

    extra_weight: nn.Parameter | None

    def __init__(self, vocab_size: int, dim: int, extra_rows: int = 0) -> None:
        super().__init__(vocab_size, dim)
        extra = nn.Parameter(torch.empty(extra_rows, dim).normal_(std=0.02)) if extra_rows else None
        self.register_parameter("extra_weight", extra)

    def forward(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Return the row of each id, as from one concatenated table.

        Always reads both tables, because under ZeRO-3 all ranks must gather the same parameters.
        """
        if self.extra_weight is None:
            return super().forward(ids)
        new = ids >= self.num_embeddings
        known = F.embedding(ids.masked_fill(new, 0), self.weight)
        extra = F.embedding((ids - self.num_embeddings).clamp(min=0), self.extra_weight)
        return torch.where(new.unsqueeze(1), extra, known)


class LanguageHead(nn.Module):
    """Computes logits or the loss from hidden rows.

    Args:
        vocab_size: V, rows of ``weight``.
        dim: D.
        tied: The embedding whose parameters the head shares; None: the head has its own.
        extra_rows: Rows of ``extra_weight``, for ids V, V + 1, ...; 0, or the number of the embedding's extra rows.
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
        """Return logits; with ``labels`` and ``loss_weights``, return the loss instead.

        Logits are ``(T, V)``, with further columns for extra rows. The loss is the float32 sum over rows that
        ``linear_cross_entropy`` computes; that function documents the arguments.
        """
        if labels is None or loss_weights is None:
            logits = F.linear(hidden, self.weight)
            extra = self.extra_weight
            return logits if extra is None else torch.cat([logits, F.linear(hidden, extra)], dim=-1)
        return linear_cross_entropy(
            hidden, self.weight, labels, loss_weights, row_losses, self.extra_weight, z_loss, soft_targets
        )
