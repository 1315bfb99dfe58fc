"""Patch embedding: uint8 patches to rows of a tower, with an optional class token and learned positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.host import to_device


class FramesProjection(nn.Linear):
    """A projection of patches that span ``frames`` frames: of videos, and of still images as identical frames.

    The weight is that of the convolution over video, ``(D, channels * frames * patch**2)``. For still images, summing
    the weight over its frames gives the result for repeated pixels at ``1 / frames`` of the cost. Each frame's weight
    receives the same gradient.

    Args:
        channels: Colour channels.
        frames: Frames that a patch spans.
        pixels: Pixels of one channel of one frame of a patch.
        dim: D.
        bias: Whether the projection has a bias.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1: an image counts as two identical frames.
    """

    def __init__(self, channels: int, frames: int, pixels: int, dim: int, bias: bool) -> None:
        super().__init__(channels * frames * pixels, dim, bias=bias)
        self.per_frame = (channels, frames, pixels)

    def forward(
        self,
        values: Float[Tensor, "P patch_dim"],
        later: Float[Tensor, "Q later_dim"] | None = None,
        later_index: Int[Tensor, " Q"] | None = None,
    ) -> Float[Tensor, "P D"]:
        """Return the rows of all patches.

        Args:
            values: Each patch, or its first frame, laid out (channel, row, column).
            later: The other frames of the Q patches of videos, frame after frame; None: there are none.
            later_index: Row in ``values`` of each row of ``later``.
        """
        weight = self.weight.unflatten(1, self.per_frame)
        rows = F.linear(values, weight.sum(dim=2).flatten(1), self.bias)
        if later is None or later_index is None:
            return rows
        frames = torch.cat([values.index_select(0, later_index), later], dim=1)
        moving = F.linear(frames, weight.transpose(1, 2).flatten(1), self.bias)
        return rows.index_copy(0, later_index, moving)


def normalise_pixels(
    values: UInt8[Tensor, "P patch_dim"] | Float[Tensor, "P patch_dim"],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Float[Tensor, "P patch_dim"]:
    """Return ``(values / 255 - mean) / std`` per channel.

    Args:
        values: Patches, each laid out (channel, row, column); values from 0 to 255. Floats may have a gradient.
        channels: Colour channels.
        mean: Per channel, for pixels scaled to 0..1.
        std: Per channel, for pixels scaled to 0..1.
        dtype: Dtype of the result. The arithmetic is at least float32: close to the mean, a difference of two bfloat16
            numbers would keep few correct bits.
    """
    pixels = values.to(torch.promote_types(dtype, torch.float32), copy=True).view(values.shape[0], channels, -1)
    # Loop over channels with Python numbers, so that no constant is copied to the device.
    for channel, (middle, width) in enumerate(zip(mean, std, strict=True)):
        pixels[:, channel].mul_(1 / (255 * width)).sub_(middle / width)
    return pixels.flatten(1).to(dtype)


class PatchEmbed(nn.Module):
    """Normalises uint8 patches and projects each to D channels.

    A linear layer over flattened patches is the convolution with stride = kernel of the published towers: reshape its
    ``(D, channels, patch, patch)`` weight to ``(D, patch_dim)``.

    Args:
        channels: Colour channels; a patch is laid out (channel, row, column).
        patch_size: Side of a patch, pixels.
        dim: D.
        mean: Per channel, for pixels scaled to 0..1.
        std: Per channel, for pixels scaled to 0..1.
        bias: Whether the projection has a bias.
        frames: Frames that a patch of the published convolution spans; above 1, its weight is
            ``(D, channels, frames, patch, patch)`` (see ``FramesProjection``).

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
            self.projection = FramesProjection(channels, frames, patch_size**2, dim, bias)
        self.channels = channels
        self.mean = mean
        self.std = std

    def forward(
        self,
        values: UInt8[Tensor, "P patch_dim"] | Float[Tensor, "P patch_dim"],
        later_values: UInt8[Tensor, "Q later_dim"] | None = None,
        later_index: Int[Tensor, " Q"] | None = None,
    ) -> Float[Tensor, "P D"]:
        """Return the rows of all patches. The arguments are those of ``MediaBlock``; None: there is no video."""
        dtype = self.projection.weight.dtype
        first = self._normalised(values, dtype)
        if later_values is None or later_index is None or not len(later_index):
            return self.projection(first)
        frames = self._normalised(later_values.reshape(-1, values.shape[1]), dtype)
        return self.projection(first, frames.view(later_values.shape), later_index)

    def _normalised(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return normalise_pixels(values, self.channels, self.mean, self.std, dtype)


class LearnedPositions(nn.Module):
    """Adds a learned vector per grid position; optionally puts a class token first in every crop.

    Args:
        grid: Patches (rows, columns) of every crop.
        dim: D.
        class_token: Whether to add a class token; its row of the table is the first.

    Source: Dosovitskiy et al. 2021, section 3.1.
    """

    def __init__(self, grid: tuple[int, int], dim: int, class_token: bool) -> None:
        super().__init__()
        self.grid = grid
        self.num_patches = grid[0] * grid[1]
        self.position_embedding = nn.Parameter(torch.zeros(self.num_patches + class_token, dim))
        if class_token:
            self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.class_token = class_token

    def forward(self, patches: Float[Tensor, "P D"]) -> Float[Tensor, "P_with_class D"]:
        """Return the rows of all crops, class tokens included. ``patches`` are packed crops of ``num_patches`` rows."""
        crops = patches.view(-1, self.num_patches, patches.shape[-1])
        if self.class_token:
            first = self.class_embedding.expand(crops.shape[0], 1, -1)
            crops = torch.cat([first, crops], dim=1)
        return (crops + self.position_embedding).flatten(0, 1)


@lru_cache(maxsize=4096)
def buckets(count: int, num_buckets: int) -> np.ndarray:
    """Return the bucket of each of ``count`` rows of a crop: int64 ``(count,)``, ascending, below ``num_buckets``.

    The arithmetic is float32, as in transformers. A row exactly on a boundary is therefore sometimes in the lower
    bucket: of 50 rows and 70 buckets, rows 5, 10, 15, 20, 30 and 40.

    Source: ``Idefics3VisionEmbeddings`` in transformers; NaViT (arXiv 2307.06304), section 2.1, fractional positions.
    """
    boundaries = torch.arange(1 / num_buckets, 1.0, 1 / num_buckets, dtype=torch.float32, device="cpu")
    steps = torch.arange(count, dtype=torch.float32, device="cpu") * (1.0 / torch.tensor(count, device="cpu"))
    return torch.bucketize(steps.clamp(max=1.0 - 1e-6), boundaries, right=True).numpy()


class BucketedPositions(nn.Module):
    """Adds a learned vector to each patch, chosen by the patch's relative position in its crop.

    Args:
        grid: Buckets (rows, columns) of the table.
        dim: D.

    Source: Idefics2 (arXiv 2405.02246), section 3.2; Aria (arXiv 2410.05993), section 2.2.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.position_embedding = nn.Parameter(torch.zeros(grid[0] * grid[1], dim))

    def forward(self, patches: Float[Tensor, "P D"], grids: Sequence[tuple[int, int, int]]) -> Float[Tensor, "P D"]:
        """Return the patches of all crops with their vectors; ``grids`` has (time, rows, columns) of each crop."""
        indices = [
            np.tile(
                (buckets(height, self.grid[0])[:, None] * self.grid[1] + buckets(width, self.grid[1])).ravel(), time
            )
            for time, height, width in grids
        ]
        table_rows = to_device(np.concatenate(indices), patches.device)
        return patches + F.embedding(table_rows, self.position_embedding)


def resample_positions(
    table: Float[Tensor, "rows D"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "new_rows D"]:
    """Return a position table for another grid, by bicubic interpolation; a class token's row is copied.

    Args:
        table: ``old[0] * old[1]`` rows in row-major order, with the row of a class token before them if there is one.
        old: Grid (rows, columns) of ``table``.
        new: Grid (rows, columns) of the result.

    Source: Dosovitskiy et al. 2021, section 3.2.
    """
    class_row, patch_rows = table.split([table.shape[0] - old[0] * old[1], old[0] * old[1]])
    plane = patch_rows.view(1, *old, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(plane, size=new, mode="bicubic", align_corners=False)
    return torch.cat([class_row, resampled.permute(0, 2, 3, 1).flatten(0, 2)])
