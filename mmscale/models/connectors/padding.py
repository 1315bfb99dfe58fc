"""Learned embeddings that mark patches with padding."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import MediaBlock

_REAL, _ALL, _SOME = range(3)


def padding_of_patches(media: MediaBlock) -> Int[Tensor, " P"]:
    """Return a class per patch: 0 without padding, 1 if the whole patch is padding, 2 if part of it is.

    Without ``media.content_area``, every patch has class 0. Computed on the device; the host does not wait for it.
    """
    total, device = media.items.total, media.values.device
    if media.content_area is None:
        return torch.zeros(total, dtype=torch.int64, device=device)
    lengths = media.items.cu.diff()
    start, grid, rectangles = (
        each.repeat_interleave(lengths, dim=0, output_size=total)
        for each in (media.items.cu[:-1], media.grid, media.content_area.view(-1, 2, 4))
    )
    offset = (torch.arange(total, device=device) - start) % (grid[:, 1] * grid[:, 2])  # Within the frame.
    corner = torch.stack([offset // grid[:, 2], offset % grid[:, 2]], dim=1).unsqueeze(1)  # (P, 1, row and column)
    first, size = rectangles.split(2, dim=2)
    touched, filled = ((corner >= first) & (corner < first + size)).all(2).unbind(1)
    return torch.where(filled, _REAL, torch.where(touched, _SOME, _ALL))


class PaddingEmbedding(nn.Module):
    """Adds a learned vector to the features of patches with padding.

    Source: Molmo's code, olmo/model.py (``pad_and_partial_pad``).
    """

    constant_init: ClassVar[dict[str, float]] = {"pad_embed": 0.0}

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.pad_embed = nn.Parameter(torch.zeros(2, feature_dim))

    def forward(self, features: Float[Tensor, "P feature_dim"], media: MediaBlock) -> Float[Tensor, "P feature_dim"]:
        """Return the features with the vectors added; patches without padding are unchanged."""
        table = F.pad(self.pad_embed, (0, 0, 1, 0))
        return features + F.embedding(padding_of_patches(media), table)
