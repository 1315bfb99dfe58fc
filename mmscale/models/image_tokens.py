"""Image tokens: the codes of an image tokenizer as tokens that the decoder reads and predicts.

    grid of codes --+ first id--> token ids and labels --embedding--> decoder --head--> logits of the next code

The id of an image token is ``first id + code`` in both kinds:

    vocabulary   a range of the vocabulary: the text's embedding and head serve both (Emu3)
    separate     the ids after the vocabulary: an embedding and a head of their own (Janus)

Batches therefore need no further field: an id decides how its row is embedded, and a label decides which head it
belongs to.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.block import ACTIVATIONS, Activation
from mmscale.nn.cross_entropy import ZLoss, linear_cross_entropy
from mmscale.nn.sizes import ShrunkTo, Vocabulary, Width

COMPONENT = "image_tokens"
"""Component of the embedding and the head of ``kind: separate``."""
TOKENIZER = "image_tokenizer"
"""Component of the image tokenizer in a model that draws. No stage trains it: the data hold its codes."""
_BIAS_COLUMNS = 8
"""Columns that carry the bias in the product with the head's matrix: a multiple of 8 keeps the width aligned for
tensor cores."""
Codes = Annotated[Vocabulary, ShrunkTo(64)]


class VocabularyImageTokensConfig(StrictConfig):
    """Image tokens that are rows of the vocabulary, extra tokens included (Emu3)."""

    kind: Literal["vocabulary"] = "vocabulary"
    first_id: Annotated[int, Field(ge=0, le=1 << 24), ShrunkTo(1024)]
    """Token id of code 0; code c has the id ``first_id + c``."""
    codes: Codes
    """Number of codes of the image tokenizer."""


class SeparateImageTokensConfig(StrictConfig):
    """Image tokens with an embedding and a head of their own; their ids follow those of the vocabulary (Janus)."""

    kind: Literal["separate"] = "separate"
    codes: Codes
    """C, number of codes of the image tokenizer."""
    code_dim: Width
    """Channels of a code's embedding, before two layers project it to the decoder's width."""
    activation: Activation = Activation.GELU
    """Activation between the two layers of the projection, and of the head."""


AnyImageTokensConfig = Annotated[
    VocabularyImageTokensConfig | SeparateImageTokensConfig,
    Field(discriminator="kind"),
]


class ImageTokenEmbedding(nn.Module):
    """Embeds codes: a table with few channels, then two layers to the decoder's width.

    Source: Janus (arXiv 2410.13848), section 3.1: "generation adaptor".
    """

    def __init__(self, config: SeparateImageTokensConfig, dim: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(config.codes, config.code_dim)
        self.fc1 = nn.Linear(config.code_dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.activate = ACTIVATIONS[config.activation]

    def forward(self, codes: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Return the row of each code."""
        return self.fc2(self.activate(self.fc1(self.codes(codes))))


class ImageHead(nn.Module):
    """Computes logits of the next code, or the loss, from hidden rows: two layers with an activation between them.

    Source: Janus (arXiv 2410.13848), section 3.1: "a randomly initialized prediction head".
    """

    def __init__(self, config: SeparateImageTokensConfig, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        # Parameters of this module, not of a linear layer: the loss reads them in this module's forward pass.
        self.weight = nn.Parameter(torch.empty(config.codes, dim).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(config.codes))
        self.activate = ACTIVATIONS[config.activation]

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        labels: Int[Tensor, " T"] | None = None,
        loss_weights: Float[Tensor, " T"] | None = None,
        row_losses: Float[Tensor, " T"] | None = None,
        z_loss: ZLoss | None = None,
        learned: Int[Tensor, " L"] | None = None,
    ) -> Tensor:
        """Return logits ``(T, C)``; with ``labels`` (codes) and ``loss_weights``, return the loss instead.

        The arguments are those of ``linear_cross_entropy``, whose ``rows`` are ``learned``; a row with weight 0 changes
        neither loss nor gradient.
        """
        rows = self.activate(self.fc1(hidden))
        if labels is None or loss_weights is None:
            return F.linear(rows, self.weight, self.bias)
        # The loss has no bias, so the bias becomes a column of the matrix and the rows get a column of ones.
        bias = F.pad(self.bias.unsqueeze(1), (0, _BIAS_COLUMNS - 1))
        matrix = torch.cat([self.weight, bias], dim=1)
        rows = F.pad(rows, (0, _BIAS_COLUMNS), value=1.0)
        return linear_cross_entropy(rows, matrix, labels, loss_weights, row_losses, z_loss=z_loss, rows=learned)
