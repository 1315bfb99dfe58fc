"""An image tokenizer as a model that a run trains: images of a batch, their codes, and the images of these codes."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import MediaBlock, MultimodalBatch
from mmscale.models.config import TokenizerConfig
from mmscale.models.image_tokenizer import ImageTokenizerConfig, build_image_tokenizer
from mmscale.models.parameter_counts import describe_parameters
from mmscale.nn.codebook import Quantized
from mmscale.nn.discriminator import PatchDiscriminator
from mmscale.nn.image_blocks import images_of_patches

_COUNTED_SIDE = 32
"""Rows and columns of codes of the image for which ``encoding_flops`` counts."""


class Reconstruction(NamedTuple):
    """Images, their codes, and the images of the codes.

    Attributes:
        images: ``(N, channels, H, W)`` in [-1, 1].
        reconstructions: ``(N, channels, H, W)``, not clamped. Their gradient passes the search for codes as if each
            latent had been its own code (straight through).
        quantized: R = N * h * w, image by image.
    """

    images: Tensor
    reconstructions: Tensor
    quantized: Quantized


class ImageTokenizerModel(nn.Module):
    """An image tokenizer without a model that reads its tokens.

    Every batch runs every module, because sharded ranks must run the same modules: packs without an image carry a dummy
    document.

    Attributes:
        image_tokenizer: The tokenizer.
        discriminator: Run by the adversarial loss, not by the model; None without one.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tokenizer = build_image_tokenizer(config.image_tokenizer)
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator is not None:
            self.discriminator = PatchDiscriminator(config.discriminator, config.image_tokenizer.channels)

    def forward(self, batch: MultimodalBatch) -> Reconstruction:
        """Return the reconstructions of all images of a batch, those of dummy documents included."""
        dtype = self.image_tokenizer.codebook.weight.dtype
        return self.reconstruct(images_of(batch.media["image"], self.config).to(dtype))

    def reconstruct(self, images: Float[Tensor, "N channels H W"]) -> Reconstruction:
        """Return the reconstructions of images in [-1, 1]."""
        latents = self.image_tokenizer.latents(images)
        quantized = self.image_tokenizer.quantize(latents)
        passed = quantized.latents + (quantized.codes - quantized.latents).detach()
        codes = passed.view(len(images), *latents.shape[2:], -1).permute(0, 3, 1, 2)
        return Reconstruction(images, self.image_tokenizer.images_of(codes), quantized)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe_parameters(self.components())})"

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each component: ``encoder``, ``codebook``, ``decoder``, and a ``discriminator``."""
        parts = self.image_tokenizer.components()
        return (
            parts if self.discriminator is None else {**parts, "discriminator": list(self.discriminator.parameters())}
        )

    def checkpoint_units(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass."""
        return self.image_tokenizer.blocks()


def images_of(media: MediaBlock, config: TokenizerConfig) -> Float[Tensor, "N channels H W"]:
    """Return the images of a batch, in [-1, 1] and float32. An item has ``image_size`` pixels a side."""
    tokenizer = config.image_tokenizer
    side = config.image_size // tokenizer.stride
    return images_of_patches(media.values, (side, side), tokenizer.channels, tokenizer.stride)


@lru_cache(maxsize=16)
def encoding_flops(config: ImageTokenizerConfig) -> int:
    """Return the operations of encoding an image, for each of its codes, without the search for codes.

    torch counts them (``FlopCounterMode``) for an image of 32 x 32 codes. The share of attention grows with the size.
    """
    with torch.device("meta"):
        tokenizer = build_image_tokenizer(config)
        side = _COUNTED_SIDE * config.stride
        images = torch.empty(1, config.channels, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.latents(images)
    return counter.get_total_flops() // _COUNTED_SIDE**2


class ImageFlops(NamedTuple):
    """Operations of one image: forward pass, backward pass, and what activation checkpointing repeats."""

    forward: int
    backward: int
    recomputed: int


@lru_cache(maxsize=16)
def image_flops(config: TokenizerConfig, trained: frozenset[str]) -> ImageFlops:
    """Return the operations of one image of a run; ``trained``: components that receive gradients.

    torch counts them (``FlopCounterMode``) in a pass on the meta device, once for each configuration. A trained
    discriminator judges the image and its reconstruction, and the reconstruction again for the tokenizer.
    """
    with torch.device("meta"):
        model = ImageTokenizerModel(config)
        size, channels = config.image_size, config.image_tokenizer.channels
        images = torch.empty(1, channels, size, size)
    for name, parameters in model.components().items():
        for parameter in parameters:
            parameter.requires_grad_(name in trained)
    units = 0

    def count(module: nn.Module, inputs: tuple[Tensor | None, ...]) -> None:
        nonlocal units
        with FlopCounterMode(display=False) as inner, torch.no_grad():
            module.forward(*inputs)
        units += inner.get_total_flops()

    with FlopCounterMode(display=False) as forward:
        output = model.reconstruct(images)
        ends = [output.reconstructions.sum() + output.quantized.latents.sum()]
        if model.discriminator is not None and "discriminator" in trained:
            judged = torch.cat([images, output.reconstructions.detach()])
            ends.append(model.discriminator(judged, frozen=False).sum())
            ends.append(model.discriminator(output.reconstructions, frozen=True).sum())
    with FlopCounterMode(display=False) as backward:
        if (end := torch.stack(ends).sum()).requires_grad:
            end.backward()
    handles = [unit.register_forward_pre_hook(count) for unit in model.checkpoint_units()]
    with torch.no_grad():
        model.reconstruct(images)
    for handle in handles:
        handle.remove()
    return ImageFlops(forward.get_total_flops(), backward.get_total_flops(), units)


def batch_flops(config: TokenizerConfig, batch: MultimodalBatch, trained: Collection[str]) -> ImageFlops:
    """Return the operations of a microbatch; ``trained``: components that receive gradients."""
    one, count = image_flops(config, frozenset(trained)), batch.media["image"].items.num
    return ImageFlops(*(count * value for value in one))
