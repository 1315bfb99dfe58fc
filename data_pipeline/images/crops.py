"""What becomes of one image, decided from its size alone: a plan, and the pixels that carry it out.

    size, draws --ImageTransform.plan--> ImagePlan --render(pixels)--> patches of each view

A plan knows every grid, so a document can be measured without decoding anything. Not for: which plan an image gets
(``transforms``), decoding (``decode``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from data_pipeline.document import Coverage, Region
from data_pipeline.images.augment import Box, ColorChange, cut
from data_pipeline.images.decode import Pixels
from data_pipeline.images.native_sizes import Size
from data_pipeline.media_spec import Grid


@dataclass(frozen=True)
class Canvas:
    """The image resized to ``content`` and laid on a plane of ``size``, its top left corner at ``at``."""

    content: Size
    size: Size
    at: tuple[int, int] = (0, 0)
    fill: int = 255
    """Value of all channels where the image does not reach."""


@dataclass(frozen=True)
class View:
    """A rectangle of a canvas, handed to the tower.

    Attributes:
        canvas: Index into ``ImagePlan.canvases``.
        top, left: Its corner on the canvas, pixels.
        grid: Patches along (time, height, width).
        embedded: Written into token slots (True) or attended (False).
        kept, place, coverage, tiles: As in ``MediaItem``.
    """

    canvas: int
    top: int
    left: int
    grid: Grid
    embedded: bool
    kept: Region | None = None
    place: tuple[int, int] | None = None
    coverage: Coverage | None = None
    tiles: tuple[int, int] = (1, 1)


def coverage(canvas: Canvas, top: int, left: int, rows: int, columns: int, patch_size: int) -> Coverage:
    """What of a view of so many patches, its corner at (top, left) of the canvas, the image covers."""
    spans = []
    for corner, at, length, patches in zip((top, left), canvas.at, canvas.content, (rows, columns), strict=True):
        first, stop = at - corner, at - corner + length  # Pixels of the view.
        outer = _clipped(first // patch_size, -(-stop // patch_size), patches)
        spans.append((outer, _clipped(-(-first // patch_size), stop // patch_size, patches)))
    regions = [Region(down[0], across[0], down[1], across[1]) for down, across in zip(*spans, strict=True)]
    return Coverage(regions[0], regions[1])


def _clipped(first: int, stop: int, patches: int) -> tuple[int, int]:
    """First and number of those between the two that there are."""
    first, stop = max(first, 0), min(stop, patches)
    return first, max(stop - first, 0)


@dataclass(frozen=True)
class ImagePlan:
    """All that happens to one image.

    Attributes:
        size: The image as shown; boxes are in its pixels.
        canvases: Resized renderings; views are cut from them.
        views: In reading order.
        box: Part of the image that is kept, white where it reaches beyond; None keeps the image as it is.
        flip: Whether left and right are exchanged, after ``box``.
        color: Change of colours, at the final size, where pixels are fewest.
    """

    size: Size
    canvases: tuple[Canvas, ...]
    views: tuple[View, ...]
    box: Box | None = None
    flip: bool = False
    color: ColorChange | None = None

    @functools.cached_property
    def needed_size(self) -> Size:
        """Height and width of the decoded image below which a canvas would be enlarged for want of pixels."""
        kept = self.size if self.box is None else self.box[2:]
        # Rounded up: -(-a // b).
        height, width = (
            max(-(-canvas.content[axis] * self.size[axis] // kept[axis]) for canvas in self.canvases) for axis in (0, 1)
        )
        return height, width


def render(
    pixels: Pixels, plan: ImagePlan, patch_size: int, interpolation: str, out: Sequence[npt.NDArray[np.uint8]]
) -> None:
    """Writes the patches of every view.

    Args:
        pixels: The decoded image, of ``plan.size`` or, from a decoder that scales, smaller.
        plan: What to do.
        patch_size: Side of a patch, pixels.
        interpolation: Resize filter.
        out: Where they go, uint8 ``(P, patch_dim)`` for each view.
    """
    if plan.box is not None:
        pixels = cut(pixels, _scaled(plan.box, plan.size, pixels.shape))
    if plan.flip:
        pixels = pixels[:, ::-1].copy()  # ascontiguousarray keeps the negative stride of a single column.
    canvases = [_draw(pixels, canvas, plan.color, interpolation) for canvas in plan.canvases]
    for view, patches in zip(plan.views, out, strict=True):
        height, width = view.grid[1] * patch_size, view.grid[2] * patch_size
        patchify(
            canvases[view.canvas][view.top : view.top + height, view.left : view.left + width], patch_size, patches
        )


def _scaled(box: Box, size: Size, shape: Sequence[int]) -> Box:
    """The box in the pixels of a decoded image that is ``shape`` instead of ``size``."""
    if (shape[0], shape[1]) == size:
        return box
    down, right = shape[0] / size[0], shape[1] / size[1]
    top, left, height, width = box
    return round(top * down), round(left * right), max(1, round(height * down)), max(1, round(width * right))


def _draw(pixels: Pixels, canvas: Canvas, color: ColorChange | None, interpolation: str) -> Pixels:
    pixels = resize(pixels, canvas.content, interpolation)
    if canvas.content != canvas.size:
        plane = np.full((*canvas.size, 3), canvas.fill, dtype=np.uint8)
        top, left = canvas.at
        plane[top : top + canvas.content[0], left : left + canvas.content[1]] = pixels
        pixels = plane
    return pixels if color is None else color(pixels)


def resize(pixels: Pixels, size: Size, interpolation: str = "bicubic") -> Pixels:
    """Antialiased resize; ``pixels`` itself if it already fits, else a view of planes, ready to be cut into patches.

    Widths first, then heights, rounded to bytes in between: byte for byte torchvision's. From Pillow's it differs by
    one step in about one value of 400: 74 dB, of 300 random sizes 67 to 98. (From version 13 on Pillow takes the
    heights of tall images first, which leaves 55 dB; neither order is nearer to the unrounded result.)

    ``bilinear_float`` is torchvision's of float32 images: rounded to bytes once, at the end.
    """
    if pixels.shape[:2] == size:
        return pixels
    # Channels last: the SIMD path. The views are numpy's, torch's take several times as long.
    planes = torch.from_numpy(np.ascontiguousarray(pixels).transpose(2, 0, 1)[None])
    if interpolation == "bilinear_float":
        out = _bilinear_float(planes, size)
    else:
        out = F.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return out.numpy()[0].transpose(1, 2, 0)


def _bilinear_float(planes: torch.Tensor, size: Size) -> torch.Tensor:
    """By torchvision, since ``interpolate`` itself gives wrong values of float images that become one pixel wide."""
    from torchvision.transforms.v2.functional import InterpolationMode, resize_image

    whole = resize_image(planes.float(), list(size), InterpolationMode.BILINEAR, antialias=True)
    return whole.round().to(torch.uint8)


def patchify(pixels: Pixels, patch_size: int, out: npt.NDArray[np.uint8]) -> None:
    """``(H, W, C)`` to ``(P, C * patch_size**2)``: patches row-major, each in order (channel, row, column)."""
    height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    patches = out.reshape(rows, columns, channels, patch_size, patch_size)
    if pixels.strides[1] == 1:  # Planes, as ``resize`` gives them: a row of a patch is one piece of memory.
        piece = np.dtype((np.void, patch_size))
        planes = pixels.transpose(2, 0, 1).view(piece).reshape(channels, rows, patch_size, columns)
        np.copyto(patches.view(piece)[..., 0], planes.transpose(1, 3, 0, 2))
    else:
        parts = pixels.reshape(rows, patch_size, columns, patch_size, channels)
        np.copyto(patches, parts.transpose(0, 2, 4, 1, 3))
