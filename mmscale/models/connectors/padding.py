"""Learned vectors that tell the decoder which patches show padding."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import MediaBlock

_REAL, _ALL, _SOME = range(3)


def padding_of_patches(media: MediaBlock) -> Int[Tensor, " P"]:
    """Of each patch: 0 if nothing of it is padding, 1 if all of it is, 2 if some of it is.

    Computed on the device from the rectangles of the items, without waiting for it.
    """
    total, device = media.items.total, media.values.device
    if media.coverage is None:
        return torch.zeros(total, dtype=torch.int64, device=device)
    lengths = media.items.cu.diff()
    start, grid, rectangles = (
        each.repeat_interleave(lengths, dim=0, output_size=total)
        for each in (media.items.cu[:-1], media.grid, media.coverage.view(-1, 2, 4))
    )
    place = (torch.arange(total, device=device) - start) % (grid[:, 1] * grid[:, 2])  # Within its frame.
    corner = torch.stack([place // grid[:, 2], place % grid[:, 2]], dim=1).unsqueeze(1)  # (P, 1, row and column)
    first, size = rectangles.split(2, dim=2)
    touched, filled = ((corner >= first) & (corner < first + size)).all(2).unbind(1)
    return torch.where(filled, _REAL, torch.where(touched, _SOME, _ALL))


class PaddingEmbedding(nn.Module):
    """Adds a learned vector to the features of patches that show padding.

    Source: Molmo's code, olmo/model.py (``pad_and_partial_pad``).
    """

    constant_init: ClassVar[dict[str, float]] = {"pad_embed": 0.0}

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.pad_embed = nn.Parameter(torch.zeros(2, feature_dim))

    def forward(self, features: Float[Tensor, "P feature_dim"], media: MediaBlock) -> Float[Tensor, "P feature_dim"]:
        """Rows of patches without padding stay as they are."""
        table = F.pad(self.pad_embed, (0, 0, 1, 0))
        return features + F.embedding(padding_of_patches(media), table)
