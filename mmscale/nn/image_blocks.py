"""Convolutional blocks of image tokenizers: residual blocks, attention over pixels, and causal layers over frames.

All blocks take ``(N, C, H, W)``; those over frames take ``(N, C, T, H, W)``. A decoder's norms may depend on the codes
(``CodeNorm``), so every block takes the codes as second argument and ignores them if its norms are plain.

Source: Esser et al. 2021, "Taming transformers" (VQGAN); Zheng et al. 2022, "MoVQ", section 3.2 (norms that depend on
the codes); Emu3 (arXiv 2409.18869), section 2.2 (layers over frames).
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-6


def silu(hidden: Tensor) -> Tensor:
    """Return SiLU of a tensor that the caller does not use afterwards. Without gradients, the result replaces it."""
    return F.silu(hidden, inplace=not torch.is_grad_enabled())


class Conv2d(nn.Conv2d):
    """A convolution whose initial values follow its fan-in, as those of other layers (``mmscale/nn/init.py``)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2 if stride == 1 else 0)
        self.init_std = 1 / math.sqrt(inputs * kernel**2)


class CausalConv3d(nn.Module):
    """A convolution over frames, rows and columns whose output at a frame depends on that frame and earlier ones.

    Two frames of zeros are added before the first. Rows and columns keep their number.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], *, time_stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(time_stride, 1, 1))
        self.conv.init_std = 1 / math.sqrt(inputs * math.prod(kernel))  # type: ignore[assignment]
        rows, columns = (kernel[1] - 1) // 2, (kernel[2] - 1) // 2
        self.padding = (columns, columns, rows, rows, 2, 0)

    def forward(self, frames: Tensor) -> Tensor:
        hidden: Tensor = self.conv(F.pad(frames, self.padding))
        return hidden


class GroupNorm(nn.GroupNorm):
    """A group norm without codes."""

    constant_init: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels, eps=_EPS)

    def forward(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        del codes
        return super().forward(hidden)


class CodeNorm(nn.Module):
    """A group norm whose scale and offset at a pixel are linear functions of the code there.

    Source: MoVQ (arXiv 2209.09002), section 3.2.
    """

    def __init__(self, channels: int, groups: int, code_dim: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.scale = Conv2d(code_dim, channels, 1)
        self.offset = Conv2d(code_dim, channels, 1)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        # All pixels of a code have one scale and one offset: compute them once, and broadcast them over these pixels.
        scale, offset = (each[:, :, :, None, :, None] for each in (self.scale(codes), self.offset(codes)))
        rows, columns = codes.shape[-2:]
        normed: Tensor = self.norm(hidden).unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
        return torch.addcmul(offset, normed, scale).flatten(4).flatten(2, 3)


def make_norm(channels: int, groups: int, code_dim: int | None) -> GroupNorm | CodeNorm:
    """Return a plain norm, or one that depends on codes of ``code_dim`` channels."""
    return GroupNorm(channels, groups) if code_dim is None else CodeNorm(channels, groups, code_dim)


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, each after a norm and SiLU, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, groups: int, code_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = make_norm(inputs, groups, code_dim)
        self.conv1 = Conv2d(inputs, outputs, 3)
        self.norm2 = make_norm(outputs, groups, code_dim)
        self.conv2 = Conv2d(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else Conv2d(inputs, outputs, 1)

    def forward(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        inner: Tensor = self.conv1(silu(self.norm1(hidden, codes)))
        inner = self.conv2(silu(self.norm2(inner, codes)))
        return inner.add_(hidden if self.shortcut is None else self.shortcut(hidden))


class PixelAttention(nn.Module):
    """Self-attention of one head over all pixels, with a norm before and a residual connection around it."""

    def __init__(self, channels: int, groups: int, code_dim: int | None = None) -> None:
        super().__init__()
        self.norm = make_norm(channels, groups, code_dim)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.o_proj = nn.Linear(channels, channels)

    def forward(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        pixels = self.norm(hidden, codes).flatten(2).transpose(1, 2)  # (N, H * W, C)
        query, key, value = (project(pixels).unsqueeze(1) for project in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.o_proj(F.scaled_dot_product_attention(query, key, value).squeeze(1))
        return hidden + attended.transpose(1, 2).reshape(hidden.shape)


class Middle(nn.Module):
    """The blocks at the lowest resolution: residual, attention, residual."""

    def __init__(self, channels: int, groups: int, code_dim: int | None = None) -> None:
        super().__init__()
        self.before = ResidualBlock(channels, channels, groups, code_dim)
        self.attention = PixelAttention(channels, groups, code_dim)
        self.after = ResidualBlock(channels, channels, groups, code_dim)

    def forward(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        out: Tensor = self.after(self.attention(self.before(hidden, codes), codes), codes)
        return out


class Level(nn.Module):
    """The blocks of one resolution, each optionally followed by attention, then a change of resolution.

    Args:
        widths: Channels before the first block and after each block.
        groups: Groups of the norms.
        attends: Whether attention follows each block.
        resize: ``"down"`` halves the sides after the blocks, ``"up"`` doubles them, None keeps them.
        code_dim: Channels of the codes that the norms depend on; None for plain norms.
    """

    def __init__(
        self, widths: tuple[int, ...], groups: int, *, attends: bool, resize: str | None, code_dim: int | None = None
    ) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.blocks = nn.ModuleList(ResidualBlock(before, after, groups, code_dim) for before, after in pairs)
        attentions = [PixelAttention(after, groups, code_dim) for _, after in pairs] if attends else []
        self.attentions = nn.ModuleList(attentions)
        self.resize = resize
        if resize is not None:
            self.conv = Conv2d(widths[-1], widths[-1], 3, stride=2 if resize == "down" else 1)

    def forward(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, codes)
            if self.attentions:
                hidden = self.attentions[number](hidden, codes)
        if self.resize == "down":
            return self.conv(F.pad(hidden, (0, 1, 0, 1)))
        if self.resize == "up":
            return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return hidden


class StoredNorm(nn.Module):
    """A batch norm that always uses its stored mean and variance, in training, too.

    Statistics of a batch would depend on the number of ranks and microbatches. The stored ones come from an imported
    checkpoint; from scratch they are 0 and 1, and the norm is a scale and an offset.
    """

    running_mean: Tensor
    running_var: Tensor
    constant_init: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, frames: Tensor) -> Tensor:
        return F.batch_norm(frames, self.running_mean, self.running_var, self.weight, self.bias, training=False)


class FrameBlock(nn.Module):
    """A residual block over frames with as many output as input channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = StoredNorm(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = StoredNorm(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, frames: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(frames)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        out: Tensor = frames + inner
        return out


def images_of_patches(
    patches: Integer[Tensor, "P patch_dim"], grid: tuple[int, int], channels: int, stride: int
) -> Float[Tensor, "N channels H W"]:
    """Return images of equal size in [-1, 1], in float32, from the bytes of their squares of ``stride`` pixels a side.

    ``grid`` is the number of rows and columns of squares; each square is in order (channel, row, column).
    """
    squares = patches.view(-1, *grid, channels, stride, stride)
    pixels = squares.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4)
    return pixels.float() / 127.5 - 1


def batch_pixels(device: torch.device) -> int:
    """Return the largest number of pixels to encode at once; one larger image is a batch of its own.

    On a CPU the activations of a batch should fit in its cache: 64 images of 128 pixels then take 5 s of a core instead
    of 9 (``python -m benchmarks.image_tokens --parts files`` on a 2-core Xeon).
    """
    return 1 << 21 if device.type == "cuda" else 1 << 15
