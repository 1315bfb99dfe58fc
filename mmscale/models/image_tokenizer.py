"""Image tokenizers: convolutional autoencoders whose latent vectors are replaced by the nearest codes of a codebook.

    images --encoder, quant_conv--> latents --codebook--> tokens, codes --post_quant_conv, decoder--> images

The kind ``vqgan`` is LlamaGen's tokenizer, which Janus uses. The kind ``movqgan`` is Emu3's: the norms of its decoder
depend on the codes, and its layers over frames shorten a clip by ``temporal_factor``. It encodes an image as a clip of
``temporal_factor`` equal frames. Losses are in ``mmscale/objectives/reconstruction.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int, Integer
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.codebook import Codebook, Quantized
from mmscale.nn.expert_parallel import full_shape
from mmscale.nn.host import to_device
from mmscale.nn.image_blocks import (
    CausalConv3d,
    Conv2d,
    FrameBlock,
    Level,
    Middle,
    batch_pixels,
    images_of_patches,
    make_norm,
    silu,
)
from mmscale.nn.sizes import Channels, Layers, ShrunkTo, Vocabulary, Width


class _TokenizerConfig(StrictConfig):
    base_dim: Annotated[Width, ShrunkTo(8)]
    """Channels of the first and the last layer; ``base_dim`` times each multiplier must be a multiple of
    ``norm_groups``."""
    multipliers: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]
    """Channels of each level as a multiple of ``base_dim``, from the finest level on. Each level after the first halves
    the sides: a token has ``2 ** (levels - 1)`` pixels a side."""
    blocks_per_level: Annotated[Layers, ShrunkTo(1, counts_blocks=True)] = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    attention_levels: tuple[Annotated[int, Field(ge=0, le=7)], ...]
    """Levels, counted from 0 at the finest, in which attention follows each block."""
    channels: Channels = 3
    """Colour channels of an image."""
    latent_dim: Annotated[Width, ShrunkTo(16)]
    """Channels between encoder and ``quant_conv``, and between ``post_quant_conv`` and decoder."""
    codebook_size: Annotated[Vocabulary, ShrunkTo(64)]
    """Number of codes K."""
    code_dim: Annotated[Width, ShrunkTo(8)]
    """Channels of a code."""
    norm_groups: Annotated[int, Field(ge=1, le=1024), ShrunkTo(4)] = 32
    """Groups of each group norm."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """How training moves the codes. ``gradient``: the optimizer minimises their distance to the latents. ``ema``: each
    code is a moving average of its latents, and the optimizer leaves it alone. Both compute the same tokens."""
    idle_counts: bool = False
    """Count the steps since each code was last used, in a buffer of the model. Needed for
    ``stages.*.reconstruction.revive_after``."""

    @model_validator(mode="after")
    def _check(self) -> _TokenizerConfig:
        if wrong := [level for level in self.attention_levels if level >= len(self.multipliers)]:
            raise ValueError(f"attention_levels={wrong}: there are {len(self.multipliers)} levels, counted from 0")
        if self.base_dim % self.norm_groups:
            raise ValueError(f"norm_groups={self.norm_groups}: must divide base_dim={self.base_dim}")
        return self

    @property
    def stride(self) -> int:
        """Pixels of a token, a side."""
        return 1 << (len(self.multipliers) - 1)


class VqganConfig(_TokenizerConfig):
    """LlamaGen's image tokenizer (arXiv 2406.06525, section 2.1), which Janus uses."""

    kind: Literal["vqgan"] = "vqgan"
    normalized_codes: Literal["never", "decoding", "always"] = "always"
    """Where latents and codes are scaled to length 1. ``always``: in the search for the nearest code and in decoding,
    as LlamaGen's and Janus' code does. ``decoding``: only in decoding, as transformers' JanusVQVAE does; its tokens
    differ from those of ``always``. Training accepts ``always`` and ``never``."""

    def build(self) -> Vqgan:
        return Vqgan(self)


class MovqganConfig(_TokenizerConfig):
    """MoVQGAN with layers over frames: the tokenizer of Emu3 (arXiv 2409.18869, section 2.2)."""

    kind: Literal["movqgan"] = "movqgan"
    temporal_factor: Literal[1, 2, 4, 8] = 4
    """Frames of a token in a clip; a power of 2."""

    @model_validator(mode="after")
    def _check_widths(self) -> MovqganConfig:
        if self.latent_dim != self.code_dim:
            raise ValueError(
                f"latent_dim={self.latent_dim}: must equal code_dim={self.code_dim}, because latents and codes pass "
                "the same layers over frames"
            )
        return self

    def build(self) -> Movqgan:
        return Movqgan(self)


ImageTokenizerConfig = Annotated[VqganConfig | MovqganConfig, Field(discriminator="kind")]


class Encoder(nn.Module):
    """Images to latents, level by level; the sides are halved after each level but the last."""

    def __init__(self, config: _TokenizerConfig) -> None:
        super().__init__()
        dims = [config.base_dim * factor for factor in (1, *config.multipliers)]
        last, groups = len(config.multipliers) - 1, config.norm_groups
        self.conv_in = Conv2d(config.channels, config.base_dim, 3)
        self.levels = nn.ModuleList(
            Level(
                (dims[level], *(dims[level + 1],) * config.blocks_per_level),
                groups,
                attends=level in config.attention_levels,
                resize="down" if level < last else None,
            )
            for level in range(last + 1)
        )
        self.middle = Middle(dims[-1], groups)
        self.norm_out = make_norm(dims[-1], groups, None)
        self.conv_out = Conv2d(dims[-1], config.latent_dim, 3)

    def forward(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "N latent_dim h w"]:
        hidden = self.conv_in(images)
        for level in self.levels:
            hidden = level(hidden)
        out: Tensor = self.conv_out(silu(self.norm_out(self.middle(hidden))))
        return out


class Decoder(nn.Module):
    """Latents to images: the levels of the encoder in reverse order, each with one block more.

    Args:
        config: Sizes.
        code_dim: Channels of the codes that the norms depend on; None for plain norms.
    """

    def __init__(self, config: _TokenizerConfig, code_dim: int | None) -> None:
        super().__init__()
        dims = [config.base_dim * factor for factor in config.multipliers]
        last, groups = len(dims) - 1, config.norm_groups
        self.conv_in = Conv2d(config.latent_dim, dims[-1], 3)
        self.middle = Middle(dims[-1], groups, code_dim)
        self.levels = nn.ModuleList(
            Level(
                (dims[min(level + 1, last)], *(dims[level],) * (config.blocks_per_level + 1)),
                groups,
                attends=level in config.attention_levels,
                resize="up" if level else None,
                code_dim=code_dim,
            )
            for level in reversed(range(last + 1))
        )
        self.norm_out = make_norm(dims[0], groups, code_dim)
        self.conv_out = Conv2d(dims[0], config.channels, 3)

    def forward(
        self, latents: Float[Tensor, "N latent_dim h w"], codes: Float[Tensor, "N C h w"] | None = None
    ) -> Float[Tensor, "N channels H W"]:
        hidden = self.middle(self.conv_in(latents), codes)
        for level in self.levels:
            hidden = level(hidden, codes)
        out: Tensor = self.conv_out(silu(self.norm_out(hidden, codes)))
        return out


class ImageTokenizer(nn.Module):
    """Base class of image tokenizers.

    Attributes:
        config: The configuration.
        codebook_size: K; tokens are below it.
        stride: Pixels of a token, a side.
        temporal_factor: Frames of a token in a clip; 1 if each frame is an image.
    """

    temporal_factor = 1
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    decoder: Decoder

    def __init__(self, config: _TokenizerConfig, normalized: str) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.stride = config.codebook_size, config.stride
        self.encoder = Encoder(config)
        self.codebook = Codebook(
            config.codebook_size,
            config.code_dim,
            normalized,
            averaged=config.codebook_update == "ema",
            counts_idle=config.idle_counts,
        )

    @abstractmethod
    def latents(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "N C h w"]:
        """Return the latents of images, before the search for codes."""

    @abstractmethod
    def images_of(self, codes: Float[Tensor, "N C h w"]) -> Float[Tensor, "N channels H W"]:
        """Return the images of codes. Values outside of [-1, 1] are not clamped."""

    def quantize(self, latents: Float[Tensor, "N C h w"]) -> Quantized:
        """Return the nearest codes of latents; R = N * h * w, row by row of each image."""
        quantized: Quantized = self.codebook(latents.permute(0, 2, 3, 1).flatten(0, 2))
        return quantized

    def forward(self, images: Sequence[Tensor] = (), tokens: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Return the tokens of batches of images ``(N, channels, H, W)``, then the images of batches of tokens.

        A model whose step encodes images is sharded so that ZeRO-3 gathers the whole tokenizer in this call. The number
        of calls must be equal on all ranks; the number and sizes of the batches of a call need not be.
        """
        encoded = (self._tokens_of(each) for each in images)
        return (*encoded, *(self.images_of(self.codes_of(each)).clamp(-1, 1) for each in tokens))

    def _tokens_of(self, images: Float[Tensor, "N channels H W"]) -> Int[Tensor, "N h w"]:
        self.check_sides(images)
        latents = self.latents(images)
        return self.quantize(latents).tokens.view(len(images), *latents.shape[2:])

    @torch.no_grad()
    def codes_of_patches(
        self, values: Integer[Tensor, "P patch_dim"], grids: Sequence[tuple[int, int]]
    ) -> Int[Tensor, " P"]:
        """Return the tokens of images that are cut into the squares of pixels of their tokens, in one call.

        Args:
            values: Bytes of the squares, image by image and row by row, each in order (channel, row, column).
            grids: Rows and columns of tokens of each image; their products sum to P.
        """
        starts = list(itertools.accumulate((height * width for height, width in grids), initial=0))
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, grid in enumerate(grids):
            by_size.setdefault(grid, []).append(number)
        batches, places = list[Tensor](), list[Tensor]()
        for (height, width), numbers in by_size.items():
            size = max(1, batch_pixels(values.device) // (height * width * self.stride**2))
            for chunk in (numbers[first : first + size] for first in range(0, len(numbers), size)):
                place = torch.cat([torch.arange(starts[number], starts[number + 1]) for number in chunk])
                places.append(to_device(place, values.device))
                images = images_of_patches(values[places[-1]], (height, width), self.config.channels, self.stride)
                batches.append(images.to(self.codebook.weight.dtype))
        tokens = self(batches)  # Also without images: ZeRO-3 gathers the weights on all ranks together.
        codes = torch.empty(len(values), dtype=torch.int64, device=values.device)
        for place, each in zip(places, tokens, strict=True):
            codes[place] = each.flatten()
        return codes

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "N channels H W"]) -> Int[Tensor, "N h w"]:
        """Return the tokens of images.

        Args:
            images: Values in [-1, 1].

        Raises:
            ValueError: a side is no multiple of ``stride``.
        """
        return self([images])[0]

    @torch.no_grad()
    def encode_clips(self, clips: Float[Tensor, "N frames channels H W"]) -> Int[Tensor, "N t h w"]:
        """Return the tokens of clips with values in [-1, 1]; t = frames / temporal_factor.

        Raises:
            ValueError: a side or the number of frames is no multiple of the token's.
        """
        return self.encode(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])

    @torch.no_grad()
    def decode(self, tokens: Int[Tensor, "N h w"]) -> Float[Tensor, "N channels H W"]:
        """Return the images of tokens, in [-1, 1].

        Raises:
            ValueError: a token is negative or at least ``codebook_size``.
        """
        return self(tokens=[tokens])[0]

    def codes_of(self, tokens: Int[Tensor, "N h w"]) -> Float[Tensor, "N C h w"]:
        """Return the codes of tokens, as ``images_of`` takes them.

        Raises:
            ValueError: a token is negative or at least ``codebook_size``.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise ValueError(
                f"tokens from {int(tokens.min())} to {int(tokens.max())}: the codebook has the numbers 0 to "
                f"{self.codebook_size - 1}; use the tokenizer that encoded them"
            )
        codes = self.codebook(None, tokens.flatten()).codes
        return codes.view(*tokens.shape, -1).permute(0, 3, 1, 2)

    def check_sides(self, images: Tensor) -> None:
        """Raise ``ValueError`` if a side of the images is no multiple of ``stride``."""
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride or not height * width:
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of the {self.stride} pixels of a "
                "token; resize or crop them"
            )

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each component: ``encoder``, ``codebook`` and ``decoder``."""
        encoding, decoding = self._parts()
        return {
            "encoder": [parameter for part in encoding for parameter in part.parameters()],
            "codebook": list(self.codebook.parameters()),
            "decoder": [parameter for part in decoding for parameter in part.parameters()],
        }

    def _parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the modules before and after the codebook."""
        return [self.encoder, self.quant_conv], [self.post_quant_conv, self.decoder]

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes, and that ZeRO-3 gathers in one message."""
        sides: list[Any] = [self.encoder, self.decoder]
        return [block for side in sides for block in (*side.levels, side.middle)]


class Vqgan(ImageTokenizer):
    """LlamaGen's tokenizer: convolutions of 1 x 1 around the codebook, plain norms."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__(config, config.normalized_codes)
        self.quant_conv = Conv2d(config.latent_dim, config.code_dim, 1)
        self.post_quant_conv = Conv2d(config.code_dim, config.latent_dim, 1)
        self.decoder = Decoder(config, None)

    def latents(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "N C h w"]:
        latents: Tensor = self.quant_conv(self.encoder(images))
        return latents

    def images_of(self, codes: Float[Tensor, "N C h w"]) -> Float[Tensor, "N channels H W"]:
        images: Tensor = self.decoder(self.post_quant_conv(codes))
        return images


class Movqgan(ImageTokenizer):
    """Emu3's tokenizer. A clip ``(N, T, channels, H, W)`` has ``(N, T / temporal_factor, h, w)`` tokens."""

    def __init__(self, config: MovqganConfig) -> None:
        super().__init__(config, "never")
        self.temporal_factor = config.temporal_factor
        self.encoder_frames = FramesDown(config)
        self.quant_conv = CausalConv3d(config.latent_dim, config.code_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.code_dim, config.latent_dim, (3, 1, 1))
        self.decoder_frames = FramesUp(config)
        self.decoder = Decoder(config, config.code_dim)

    def latents(self, images: Float[Tensor, "N channels H W"]) -> Float[Tensor, "N C h w"]:
        # The frames of an image are equal, so the encoder computes one of them.
        hidden = self.encoder(images).unsqueeze(2)
        return self._over_frames(hidden.expand(-1, -1, self.temporal_factor, -1, -1)).squeeze(2)

    def clip_latents(self, clips: Float[Tensor, "N frames channels H W"]) -> Float[Tensor, "N C t h w"]:
        """Return the latents of clips, before the search for codes; t = frames / temporal_factor.

        Raises:
            ValueError: the number of frames is no multiple of ``temporal_factor``.
        """
        count, frames = clips.shape[:2]
        if frames % self.temporal_factor or not frames:
            raise ValueError(
                f"a clip of {frames} frames: their number must be a multiple of temporal_factor="
                f"{self.temporal_factor}; drop or repeat frames"
            )
        hidden = self.encoder(clips.flatten(0, 1))
        return self._over_frames(hidden.unflatten(0, (count, frames)).transpose(1, 2))

    def _over_frames(self, hidden: Tensor) -> Tensor:
        latents: Tensor = self.quant_conv(self.encoder_frames(hidden))
        return latents

    def images_of(self, codes: Float[Tensor, "N C h w"]) -> Float[Tensor, "N channels H W"]:
        latents, frame_codes = self._decoded_frames(codes.unsqueeze(2))
        # An image is the first frame: the decoder, which has no layer over frames, need not compute the others.
        images: Tensor = self.decoder(latents[:, :, 0], frame_codes[:, :, 0])
        return images

    def clips_of(self, codes: Float[Tensor, "N C t h w"]) -> Float[Tensor, "N frames channels H W"]:
        """Return the clips of codes. Values outside of [-1, 1] are not clamped."""
        latents, frame_codes = (each.transpose(1, 2) for each in self._decoded_frames(codes))
        images: Tensor = self.decoder(latents.flatten(0, 1), frame_codes.flatten(0, 1))
        return images.unflatten(0, latents.shape[:2])

    def _decoded_frames(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents and codes of every frame. Both pass the same layers, so ``latent_dim`` equals ``code_dim``."""
        return self.decoder_frames(torch.cat([self.post_quant_conv(codes), codes])).chunk(2)

    @torch.no_grad()
    def encode_clips(self, clips: Float[Tensor, "N frames channels H W"]) -> Int[Tensor, "N t h w"]:
        self.check_sides(clips)
        latents = self.clip_latents(clips)
        tokens: Tensor = self.codebook(latents.permute(0, 2, 3, 4, 1).flatten(0, 3)).tokens
        return tokens.view(len(clips), *latents.shape[2:])

    @torch.no_grad()
    def decode_clips(self, tokens: Int[Tensor, "N t h w"]) -> Float[Tensor, "N frames channels H W"]:
        """Return the clips of tokens, in [-1, 1].

        Raises:
            ValueError: a token is negative or at least ``codebook_size``.
        """
        codes = self.codes_of(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return self.clips_of(codes.transpose(1, 2)).clamp(-1, 1)

    def _parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        encoding, decoding = super()._parts()
        return [*encoding, self.encoder_frames], [*decoding, self.decoder_frames]


class FramesDown(nn.Module):
    """Layers over frames after the encoder: convolutions that halve their number, then residual blocks."""

    def __init__(self, config: MovqganConfig) -> None:
        super().__init__()
        dim, halvings = config.latent_dim, int(math.log2(config.temporal_factor))
        self.convs = nn.ModuleList(CausalConv3d(dim, dim, (4, 3, 3), time_stride=2) for _ in range(halvings))
        self.blocks = nn.ModuleList(FrameBlock(dim) for _ in range(config.blocks_per_level))

    def forward(self, frames: Float[Tensor, "N latent_dim frames h w"]) -> Float[Tensor, "N latent_dim t h w"]:
        for conv in self.convs:
            frames = F.silu(conv(frames))
        for block in self.blocks:
            frames = block(frames)
        return frames


class FramesUp(nn.Module):
    """Layers over frames before the decoder: residual blocks, then convolutions after doubling the frames."""

    def __init__(self, config: MovqganConfig) -> None:
        super().__init__()
        dim, doublings = config.latent_dim, int(math.log2(config.temporal_factor))
        self.blocks = nn.ModuleList(FrameBlock(dim) for _ in range(config.blocks_per_level))
        self.convs = nn.ModuleList(CausalConv3d(dim, dim, (3, 3, 3)) for _ in range(doublings))

    def forward(self, frames: Float[Tensor, "N latent_dim t h w"]) -> Float[Tensor, "N latent_dim frames h w"]:
        for block in self.blocks:
            frames = block(frames)
        for conv in self.convs:
            frames = F.silu(conv(frames.repeat_interleave(2, dim=2)))
        return frames


def build_image_tokenizer(config: VqganConfig | MovqganConfig) -> ImageTokenizer:
    """Return a tokenizer on torch's current default device. The caller sets its weights.

    ``mmscale.nn.init.initialise_`` gives it initial values.
    """
    return config.build()


def image_tokenizer_digest(tokenizer: ImageTokenizer) -> str:
    """Return the SHA-256 of a tokenizer's configuration and weights, in hexadecimal.

    Two tokenizers with one digest compute the same tokens and images. Weights count with their values in float32, so a
    tokenizer and its exact copy in a wider number format have one digest. Statistics of training do not count.

    Raises:
        ValueError: the weights are sharded (ZeRO-3) or on the meta device.
    """
    config = tokenizer.config.model_dump(mode="json", exclude={"codebook_update", "idle_counts"})
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, values in _weights(tokenizer):
        if values.is_meta or (isinstance(values, nn.Parameter) and tuple(values.shape) != full_shape(values)):
            raise ValueError(f"{name} is sharded or without values: only whole weights have a digest")
        digest.update(f"{name} {list(values.shape)}".encode())
        digest.update(values.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _weights(tokenizer: ImageTokenizer) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that determine what a tokenizer computes."""
    yield from tokenizer.named_parameters()
    yield from ((name, values) for name, values in tokenizer.named_buffers() if ".running_" in name)
