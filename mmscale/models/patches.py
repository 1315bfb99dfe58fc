"""Vision without a tower: the features of a patch are its normalised pixels (Fuyu)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.batch import MediaBlock
from mmscale.models.vision_kind import Tower, TowerBase
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product
from mmscale.nn.patch_embed import normalise_pixels


class PatchesConfig(TowerBase):
    """No tower: the features of a patch are its normalised pixels (Fuyu). It has no parameters."""

    kind: Literal["patches"]
    learns: ClassVar[bool] = False
    class_feature: ClassVar[bool] = False
    tiles: ClassVar[None] = None

    @property
    def feature_dim(self) -> int:
        """Channels of a feature: the values of a patch."""
        return self.channels * self.patch_size**2

    def build(self, backend: Backend, *, absent_features: bool = False) -> PixelPatches:
        return PixelPatches(self)

    def products(self, *, learns: bool) -> list[Product]:
        return []

    def counts(self, media: MediaBlock) -> dict[str, int]:
        return {}


class PixelPatches(Tower):
    """Returns normalised pixels, for a connector that projects them.

    The result is float32 whatever the dtype of the weights, so that a pixel is rounded to that dtype only once.

    Source: Fuyu-8B's model card.
    """

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, media: MediaBlock) -> Float[Tensor, "P patch_dim"]:
        """Return the normalised pixels of every patch, each laid out (channel, row, column)."""
        config = self.config
        return normalise_pixels(media.values, config.channels, config.mean, config.std, torch.float32)
