"""What becomes of one image, decided from its size alone: a plan, and the pixels that carry it out.

    size, draws --ImageTransform.plan--> ImagePlan --render(pixels)--> patches of each view

A plan knows every grid, so a document can be measured without decoding anything. In training a plan may hold random
changes: one crop (shift and scale at once), a flip, one colour matrix. They are cheap: the crop is a slice, the resize
that follows also scales, and brightness, contrast and saturation are one 3 x 3 matrix, applied at the final size.

Not for: which plan an image gets (``transforms``), decoding (``decode``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from data_pipeline.document import Coverage, Region
from data_pipeline.images.decode import Pixels
from data_pipeline.images.native_sizes import Size
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Grid
from data_pipeline.order.randomness import Draws

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels of the source; may reach beyond it."""

_IDENTITY = np.eye(3, dtype=np.float32)
# Maps a row of (red, green, blue) to its gray in all three places. Weights: ITU-R BT.601.
_TO_GRAY = np.repeat(np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=1)


@dataclass(frozen=True)
class ColorChange:
    """A matrix and an offset on the colours of each pixel."""

    matrix: npt.NDArray[np.float32]
    offset: np.float32

    def __call__(self, pixels: Pixels) -> Pixels:
        colors = pixels.reshape(-1, 3).astype(np.float32) @ self.matrix
        colors += self.offset
        return np.clip(colors, 0, 255, out=colors).astype(np.uint8).reshape(pixels.shape)


class AugmentConfig(StrictConfig):
    """Strength of each change; 0 (or 1 for ``scale``) switches it off."""

    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift of the crop, as a share of the image's side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Side of the crop as a share of the image's side, drawn between the two; above 1 zooms out on white."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a left-right mirror; leave 0 where text or direction matters."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - b to 1 + b."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - c to 1 + c, around mid gray."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """Factor drawn from 1 - s to 1 + s, around the pixel's own gray."""

    @model_validator(mode="after")
    def _check_scale(self) -> AugmentConfig:
        low, high = self.scale
        if not 0.05 <= low <= high <= 4:
            raise ValueError(f"scale={list(self.scale)}: expected [low, high] with 0.05 <= low <= high <= 4")
        return self

    def draw(self, size: Size, rng: Draws) -> tuple[Box, bool, ColorChange | None]:
        """Draw the changes of an image of ``size``: the crop, whether it is flipped, and its change of colours if any.

        The crop is centred up to the shift. The change of colours is the same for every view of the image.
        """
        height, width = size
        scale, down, right = rng.random(3).tolist()
        side = self.scale[0] + scale * (self.scale[1] - self.scale[0])
        box_height, box_width = max(1, round(height * side)), max(1, round(width * side))
        top = (height - box_height) / 2 + (2 * down - 1) * self.shift * height
        left = (width - box_width) / 2 + (2 * right - 1) * self.shift * width
        box = round(top), round(left), box_height, box_width
        flip = rng.random() < self.flip
        strengths = (self.brightness, self.contrast, self.saturation)
        if not any(strengths):
            return box, flip, None
        brightness, contrast, saturation = (
            1 + (2 * draw - 1) * strength for draw, strength in zip(rng.random(3).tolist(), strengths, strict=True)
        )
        matrix = brightness * contrast * (saturation * _IDENTITY + (1 - saturation) * _TO_GRAY)
        return box, flip, ColorChange(matrix, np.float32(127.5 * (1 - contrast) + 0.5))  # The half rounds.


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
        top, left, height, width = plan.box
        if pixels.shape[:2] != plan.size:  # From a decoder that scales.
            down, right = pixels.shape[0] / plan.size[0], pixels.shape[1] / plan.size[1]
            top, left = round(top * down), round(left * right)
            height, width = max(1, round(height * down)), max(1, round(width * right))
        pixels = cut(pixels, (top, left, height, width))
    if plan.flip:
        pixels = pixels[:, ::-1].copy()  # ascontiguousarray keeps the negative stride of a single column.
    canvases = []
    for canvas in plan.canvases:
        drawn = resize(pixels, canvas.content, interpolation)
        if canvas.content != canvas.size:
            plane = np.full((*canvas.size, 3), canvas.fill, dtype=np.uint8)
            top, left = canvas.at
            plane[top : top + canvas.content[0], left : left + canvas.content[1]] = drawn
            drawn = plane
        canvases.append(drawn if plan.color is None else plan.color(drawn))
    for view, patches in zip(plan.views, out, strict=True):
        height, width = view.grid[1] * patch_size, view.grid[2] * patch_size
        patchify(
            canvases[view.canvas][view.top : view.top + height, view.left : view.left + width], patch_size, patches
        )


def cut(pixels: Pixels, box: Box) -> Pixels:
    """The box of the image, white where it reaches beyond."""
    top, left, height, width = box
    inside = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return inside
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    y, x = max(0, -top), max(0, -left)
    canvas[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return canvas


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
