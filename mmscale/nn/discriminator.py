"""The patch discriminator of an image tokenizer's adversarial loss: it judges each patch of an image as real or not.

The discriminator is a component of the model, so it has parameter groups of its own in the optimizer, with their own
learning rate, warm-up and clipping. ZeRO shards these groups like all others, and one checkpoint contains both players.
Losses are in ``mmscale/objectives/adversarial.py``.

Source: Isola et al. 2017, "Image-to-image translation with conditional adversarial networks", section 3.2.2; Esser et
al. 2021, "Taming transformers" (VQGAN), section 3.1.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.sizes import ShrunkTo, Width

_KERNEL = 4
_MOST_FACTOR = 8
"""Largest number of channels of a layer as a multiple of ``base_dim``."""
_SLOPE = 0.2
"""Of the leaky ReLU for negative values."""


class PatchDiscriminatorConfig(StrictConfig):
    """A patch discriminator (PatchGAN). Only training uses it; exports leave it out."""

    base_dim: Annotated[Width, ShrunkTo(8)] = 64
    """Channels of the first layer; later layers have up to 8 times as many. A multiple of ``norm_groups``."""
    halvings: Annotated[int, Field(ge=1, le=8), ShrunkTo(1)] = 3
    """Layers that halve the sides. Two more layers follow. A logit sees 16, 34, 70, 142 ... pixels a side with 1, 2, 3,
    4 ... halvings. ``image_size`` must be at least ``3 * 2 ** halvings``."""
    norm_groups: Annotated[int, Field(ge=1, le=1024), ShrunkTo(4)] = 32
    """Groups of each group norm. The published discriminators have batch norms, whose result depends on the number of
    ranks and microbatches."""

    @model_validator(mode="after")
    def _check(self) -> PatchDiscriminatorConfig:
        if self.base_dim % self.norm_groups:
            raise ValueError(f"norm_groups={self.norm_groups}: must divide base_dim={self.base_dim}")
        return self

    @property
    def least_side(self) -> int:
        """Pixels of a side of the smallest image that has a logit."""
        return 3 << self.halvings


class PatchLayer(nn.Module):
    """A convolution of 4 x 4 pixels, with a group norm or a bias.

    Args:
        inputs: Channels.
        outputs: Channels.
        stride: 2 halves the sides; 1 shortens them by 1 pixel.
        groups: Groups of the norm; None for a bias instead.
    """

    constant_init: ClassVar[dict[str, float]] = {"scale": 1.0, "offset": 0.0}

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int | None) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs, _KERNEL, _KERNEL))
        self.init_std = 1 / math.sqrt(inputs * _KERNEL**2)
        if groups is None:
            self.bias = nn.Parameter(torch.zeros(outputs))
        else:
            self.scale = nn.Parameter(torch.ones(outputs))
            self.offset = nn.Parameter(torch.zeros(outputs))

    def forward(self, hidden: Tensor, *, frozen: bool) -> Tensor:
        """Return the output. With ``frozen``, gradients reach ``hidden`` and not the parameters."""

        def own(parameter: Tensor) -> Tensor:
            return parameter.detach() if frozen else parameter

        bias = own(self.bias) if self.groups is None else None
        hidden = F.conv2d(hidden, own(self.weight), bias, self.stride, padding=1)
        if self.groups is None:
            return hidden
        return F.group_norm(hidden, self.groups, own(self.scale), own(self.offset))


class PatchDiscriminator(nn.Module):
    """Returns a logit for each patch of an image: positive for real images, negative for reconstructions.

    Attributes:
        steps: int64 ``()``, steps of training that changed weights, whether or not they used the discriminator.
        adaptive_bits: int32 ``()``, the bits of a float32: the last ratio of gradient norms
            (``mmscale/objectives/adversarial.py``); 0 before the first. An integer, so that no engine rounds it.
    """

    steps: Tensor
    adaptive_bits: Tensor

    def __init__(self, config: PatchDiscriminatorConfig, channels: int) -> None:
        super().__init__()
        dims = [config.base_dim * min(1 << number, _MOST_FACTOR) for number in range(config.halvings + 1)]
        layers = [PatchLayer(channels, dims[0], 2, None)]
        layers += [
            PatchLayer(dims[number], dims[number + 1], 2 if number < config.halvings - 1 else 1, config.norm_groups)
            for number in range(config.halvings)
        ]
        self.layers = nn.ModuleList([*layers, PatchLayer(dims[-1], 1, 1, None)])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("adaptive_bits", torch.zeros((), dtype=torch.int32))

    def forward(self, images: Float[Tensor, "N channels H W"], *, frozen: bool) -> Float[Tensor, "N 1 h w"]:
        """Return the logits. With ``frozen``, gradients reach the images and not the parameters."""
        hidden = self.layers[0](images, frozen=frozen)
        for layer in self.layers[1:]:
            hidden = layer(F.leaky_relu(hidden, _SLOPE), frozen=frozen)
        return hidden
