"""From stored pixels to patch rows, with or without a class token and learned positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


class StillProjection(nn.Linear):
    """A projection of patches that span several frames, applied to still images: each frame shows the same pixels.

    The weight is that of the convolution over video, ``(D, channels * frames * patch**2)``. Adding up its frames gives
    what repeated pixels would, for half the products; the gradient of the sum goes to every frame alike.

    Args:
        channels: Colour channels.
        frames: Frames that a patch spans.
        pixels: Of one channel of one frame.
        dim: D.
        bias: Whether there is one.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1: an image counts as two identical frames.
    """

    def __init__(self, channels: int, frames: int, pixels: int, dim: int, bias: bool) -> None:
        super().__init__(channels * frames * pixels, dim, bias=bias)
        self.per_frame = (channels, frames, pixels)

    def forward(self, values: Float[Tensor, "P patch_dim"]) -> Float[Tensor, "P D"]:
        weight = self.weight.unflatten(1, self.per_frame).sum(dim=2).flatten(1)
        return F.linear(values, weight, self.bias)


def normalised(
    values: UInt8[Tensor, "P patch_dim"],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Float[Tensor, "P patch_dim"]:
    """Pixels as numbers about 0.

    Args:
        values: Patches, each laid out (channel, row, column).
        channels: Colour channels.
        mean: Per channel, in units of full scale (0 to 1).
        std: Likewise.
        dtype: Of the result. The arithmetic is float32 at least: near the mean, two roundings to bfloat16 would leave
            few right bits of the difference.
    """
    pixels = values.to(torch.promote_types(dtype, torch.float32), copy=True).view(values.shape[0], channels, -1)
    # Channel by channel with Python numbers: no constant has to travel to the device.
    for channel, (middle, width) in enumerate(zip(mean, std, strict=True)):
        pixels[:, channel].mul_(1 / (255 * width)).sub_(middle / width)
    return pixels.flatten(1).to(dtype)


class PatchEmbed(nn.Module):
    """Normalises uint8 patches and projects each to D channels.

    A linear layer over flattened patches is the convolution with stride = kernel of the published towers: reshape its
    ``(D, channels, patch, patch)`` weight to ``(D, patch_dim)``.

    Args:
        channels: Colour channels; a patch is laid out (channel, row, column).
        patch_size: Side, pixels.
        dim: D.
        mean: Per channel, in units of full scale (0 to 1).
        std: Likewise.
        bias: Whether the projection has one.
        frames: Frames that a patch of the convolution spans; its weight is ``(D, channels, frames, patch, patch)``.

    Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words", section 3.1.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        dim: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        bias: bool,
        frames: int = 1,
    ) -> None:
        super().__init__()
        if frames == 1:
            self.projection = nn.Linear(channels * patch_size**2, dim, bias=bias)
        else:
            self.projection = StillProjection(channels, frames, patch_size**2, dim, bias)
        self.channels = channels
        self.mean = mean
        self.std = std

    def forward(self, values: UInt8[Tensor, "P patch_dim"]) -> Float[Tensor, "P D"]:
        return self.projection(normalised(values, self.channels, self.mean, self.std, self.projection.weight.dtype))


class LearnedPositions(nn.Module):
    """Adds a learned vector per grid place; optionally puts a class token first in every view.

    Args:
        grid: Patches (rows, columns) of every view.
        dim: D.
        class_token: Whether there is one; its row of the table is the first.

    Source: Dosovitskiy et al. 2021, section 3.1.
    """

    def __init__(self, grid: tuple[int, int], dim: int, class_token: bool) -> None:
        super().__init__()
        self.grid = grid
        places = grid[0] * grid[1]
        self.position_embedding = nn.Parameter(torch.zeros(places + class_token, dim))
        if class_token:
            self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.class_token = class_token
        self.places = places

    def forward(self, patches: Float[Tensor, "P D"]) -> Float[Tensor, "P_with_class D"]:
        """Packed views of ``places`` patches each."""
        views = patches.view(-1, self.places, patches.shape[-1])
        if self.class_token:
            first = self.class_embedding.expand(views.shape[0], 1, -1)
            views = torch.cat([first, views], dim=1)
        return (views + self.position_embedding).flatten(0, 1)


def resample_positions(
    table: Float[Tensor, "places D"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "new_places D"]:
    """A position table for views of another size: bicubic in the plane of the grid; a class token's row stays.

    Args:
        table: ``old[0] * old[1]`` rows in row-major order, or one more in front of them.
        old: Patches (rows, columns) that it was learned on.
        new: Patches that it is wanted for.

    Source: Dosovitskiy et al. 2021, section 3.2.
    """
    first, places = table.split([table.shape[0] - old[0] * old[1], old[0] * old[1]])
    plane = places.view(1, *old, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(plane, size=new, mode="bicubic", align_corners=False)
    return torch.cat([first, resampled.permute(0, 2, 3, 1).flatten(0, 2)])
