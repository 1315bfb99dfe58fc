"""The token embedding and the language head with its loss.

Both keep the rows of extra tokens in a separate parameter. A tied head shares the embedding's parameters. Both may
contain a module for image tokens, whose ids follow all others (``models/image_tokens.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import LearnedRows
from mmscale.models.image_tokens import ImageHead, ImageTokenEmbedding
from mmscale.nn.cross_entropy import SoftTarget, ZLoss, linear_cross_entropy


class TokenEmbedding(nn.Embedding):
    """Token embedding with the rows of extra tokens in a separate parameter, trainable while the table is frozen.

    Masking the gradient of one table would not be enough: weight decay would still change the frozen rows, and the
    optimizer would still allocate their moments.

    Args:
        vocab_size: V, rows of ``weight``.
        dim: D.
        extra_rows: Rows of ``extra_weight``, for ids V, V + 1, ...
        image: Embeds the ids after those; None if there are none.
    """

    extra_weight: nn.Parameter | None

    def __init__(
        self, vocab_size: int, dim: int, extra_rows: int = 0, image: ImageTokenEmbedding | None = None
    ) -> None:
        super().__init__(vocab_size, dim)
        self.image = image
        self.first_image_id = vocab_size + extra_rows
        extra = nn.Parameter(torch.empty(extra_rows, dim).normal_(std=0.02)) if extra_rows else None
        self.register_parameter("extra_weight", extra)

    def forward(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Return the row of each id, as from one concatenated table.

        Always reads all tables, because under ZeRO-3 all ranks must gather the same parameters. The projection of
        image tokens therefore runs on every row: 0.3 % of the operations of Janus 1.3B.
        """
        drawn = None if self.image is None else ids >= self.first_image_id
        text = ids if drawn is None else ids.masked_fill(drawn, 0)
        if self.extra_weight is None:
            rows = super().forward(text)
        else:
            new = text >= self.num_embeddings
            known = F.embedding(text.masked_fill(new, 0), self.weight)
            extra = F.embedding((text - self.num_embeddings).clamp(min=0), self.extra_weight)
            rows = torch.where(new.unsqueeze(1), extra, known)
        if self.image is None or drawn is None:
            return rows
        codes = (ids - self.first_image_id).clamp(min=0)
        return torch.where(drawn.unsqueeze(1), self.image(codes), rows)


class LanguageHead(nn.Module):
    """Computes logits or the loss from hidden rows.

    Args:
        vocab_size: V, rows of ``weight``.
        dim: D.
        tied: The embedding whose parameters the head shares; None: the head has its own.
        extra_rows: Rows of ``extra_weight``, for ids V, V + 1, ...; 0, or the number of the embedding's extra rows.
        image: Head of image tokens; None if they have none of their own.
        first_image_id: Token id of the first image token. Ignored without ``image``.
    """

    extra_weight: nn.Parameter | None

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        tied: TokenEmbedding | None = None,
        extra_rows: int = 0,
        image: ImageHead | None = None,
        first_image_id: int = 0,
    ) -> None:
        super().__init__()
        self.image, self.first_image_id = image, first_image_id
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
        learned: LearnedRows | None = None,
    ) -> Tensor:
        """Return logits; with ``labels`` and ``loss_weights``, return the loss instead.

        Logits are ``(T, V)``, with further columns for extra rows; those of a separate head of image tokens come from
        ``self.image(hidden)``. The loss is the float32 sum over rows that ``linear_cross_entropy`` computes; that
        function documents the arguments. A row's label decides which head computes its loss, and both heads run for
        every batch, because under ZeRO-3 all ranks must gather the same parameters.

        Args:
            learned: The rows with a loss weight, ``batch.learned``. Without it the host waits for the device to find
                them.

        Raises:
            ValueError: ``soft_targets`` with a separate head of image tokens.
        """
        if labels is None or loss_weights is None:
            logits = F.linear(hidden, self.weight)
            extra = self.extra_weight
            return logits if extra is None else torch.cat([logits, F.linear(hidden, extra)], dim=-1)
        drawn, text_weights = None, loss_weights
        rows = None if learned is None else learned.index()
        if self.image is not None:
            if soft_targets:
                raise ValueError("a teacher has no prediction for a separate head of image tokens")
            drawn = labels >= self.first_image_id
            text_weights = loss_weights.masked_fill(drawn, 0.0)
            rows = None if learned is None else learned.text
        loss = linear_cross_entropy(
            hidden, self.weight, labels, text_weights, row_losses, self.extra_weight, z_loss, soft_targets, rows
        )
        if self.image is None or drawn is None:
            return loss
        codes, weights = labels - self.first_image_id, loss_weights.masked_fill(~drawn, 0.0)
        rows = None if learned is None else learned.codes
        return loss + self.image(hidden, codes, weights, row_losses, z_loss, rows)
