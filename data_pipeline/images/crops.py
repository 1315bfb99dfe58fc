"""Plan the crops of an image from its size, and render the plan to patches.

    size, sample RNG --ImageTransform.plan--> ImagePlan --render(pixels)--> patches of each crop

A plan determines the grid of every crop, so a dry run of a document needs no decoding. A training plan may include
random changes: a box (shift and scale), a flip and a colour matrix. They cost little: the box is a slice, the existing
resize does the scaling, and brightness, contrast and saturation are one 3 x 3 matrix, applied at the final size.

``transforms`` chooses the plan of an image, and ``decode`` decodes it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, model_validator

from data_pipeline.document import ContentArea, Region
from data_pipeline.images.decode import Pixels
from data_pipeline.images.native_sizes import Size
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Grid
from data_pipeline.order.randomness import Rng

TORCH_HAS_LANCZOS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
"""Whether torch has a Lanczos filter; older versions use Pillow's."""
Byte = Annotated[int, Field(ge=0, le=255)]
Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the decoded image; may extend beyond the image."""

Color = tuple[Byte, Byte, Byte]
"""Red, green and blue."""

_IDENTITY = np.eye(3, dtype=np.float32)
# Maps a row (red, green, blue) to three copies of its gray value. Weights: ITU-R BT.601.
_TO_GRAY = np.repeat(np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=1)


@dataclass(frozen=True)
class ColorChange:
    """An affine change of each pixel's colour: ``pixel @ matrix + offset``, clipped to 0-255."""

    matrix: npt.NDArray[np.float32]
    offset: np.float32

    def __call__(self, pixels: Pixels) -> Pixels:
        colors = pixels.reshape(-1, 3).astype(np.float32) @ self.matrix
        colors += self.offset
        return np.clip(colors, 0, 255, out=colors).astype(np.uint8).reshape(pixels.shape)


class AugmentConfig(StrictConfig):
    """Random changes of training images. The default of each key disables it."""

    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift of the visible box from the centre, as a share of the image's side; 0 to 0.5."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range [low, high] of the visible box's side as a share of the image's side, within 0.05 to 4. Values below 1 zoom
    in; values above 1 zoom out and add white borders."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a left-right flip, 0 to 1. Use 0 if text or direction matters."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Brightness factor is drawn from 1 - b to 1 + b; b is 0 to below 1."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Contrast factor around mid gray is drawn from 1 - c to 1 + c; c is 0 to below 1."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """Saturation factor around each pixel's gray value is drawn from 1 - s to 1 + s; s is 0 to below 1."""

    @model_validator(mode="after")
    def _check_scale(self) -> AugmentConfig:
        low, high = self.scale
        if not 0.05 <= low <= high <= 4:
            raise ValueError(f"scale={list(self.scale)}: expected [low, high] with 0.05 <= low <= high <= 4")
        return self

    def draw(self, size: Size, rng: Rng) -> tuple[Box, bool, ColorChange | None]:
        """Draw the box, the flip and the colour change (None if disabled) of an image of ``size``.

        The box is centred before the shift. All crops of the image get the same colour change.
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
        # 0.5: the conversion to uint8 truncates.
        return box, flip, ColorChange(matrix, np.float32(127.5 * (1 - contrast) + 0.5))


@dataclass(frozen=True)
class Canvas:
    """The image resized to ``content`` and pasted at ``at`` (top, left) onto a background of ``size``.

    Attributes:
        content: Size of the resized image.
        size: Size of the canvas.
        at: Corner of the image on the canvas.
        fill: Value of all channels outside the image, or of each channel, 0 to 255.
        via: Sizes to which the image is resized before ``content``, in order (Idefics3); empty with ``source``.
        source: Index of an earlier canvas and a box of it, to resize instead of the image; the box must lie within it.
    """

    content: Size
    size: Size
    at: tuple[int, int] = (0, 0)
    fill: int | Color = 255
    via: tuple[Size, ...] = ()
    source: tuple[int, Box] | None = None

    @property
    def steps(self) -> tuple[Size, ...]:
        """All sizes to which the image is resized, in order."""
        return (*self.via, self.content)


def on_square(size: Size, side: int, least: int, fill: Color) -> Canvas:
    """Return the canvas of an image in the middle of a square of ``side`` pixels, with sides of at least ``least``.

    Source: JanusImageProcessor in transformers, whose order of operations the rounding follows.
    """
    scale = side / max(size)
    height, width = (max(least, round(length * scale)) for length in size)
    return Canvas((height, width), (side, side), ((side - height) // 2, (side - width) // 2), fill)


@dataclass(frozen=True)
class Crop:
    """A rectangle of a canvas: one input of the tower.

    Attributes:
        canvas: Index into ``ImagePlan.canvases``.
        top, left: Its corner on the canvas, in pixels.
        grid: Patches along (time, height, width).
        embedded: Written into token slots (True) or attended (False).
        cell: Row and column of a tile in the tiling; None if the crop shows the whole image (``MediaItem.cell``).
        kept_region, content_area, tiles: As in ``MediaItem``.
    """

    canvas: int
    top: int
    left: int
    grid: Grid
    embedded: bool
    kept_region: Region | None = None
    cell: tuple[int, int] | None = None
    content_area: ContentArea | None = None
    tiles: tuple[int, int] = (1, 1)


def content_area(canvas: Canvas, top: int, left: int, rows: int, columns: int, patch_size: int) -> ContentArea:
    """Return the patches of a crop that contain image pixels, and those that contain no padding.

    Args:
        canvas: The canvas of the crop.
        top, left: Corner of the crop on the canvas, in pixels.
        rows, columns: Size of the crop in patches.
        patch_size: Side of a patch in pixels.
    """
    ranges = []  # Per axis: the touched patches, then the filled ones.
    for corner, at, length, patches in zip((top, left), canvas.at, canvas.content, (rows, columns), strict=True):
        first, stop = at - corner, at - corner + length  # In pixels of the crop.
        touched = _clipped(first // patch_size, -(-stop // patch_size), patches)
        ranges.append((touched, _clipped(-(-first // patch_size), stop // patch_size, patches)))
    regions = [Region(down[0], across[0], down[1], across[1]) for down, across in zip(*ranges, strict=True)]
    return ContentArea(regions[0], regions[1])


def _clipped(first: int, stop: int, patches: int) -> tuple[int, int]:
    """Clip the range [first, stop) to ``range(patches)``; return its first index and its length."""
    first, stop = max(first, 0), min(stop, patches)
    return first, max(stop - first, 0)


@dataclass(frozen=True)
class ImagePlan:
    """All steps from one decoded image to its crops.

    Attributes:
        size: Size of the image after the EXIF rotation; ``box`` is in its pixels.
        canvases: Resized renderings of the image, from which the crops are cut.
        crops: Crops in reading order.
        box: Part of the image to use; white outside the image. None uses the whole image.
        flip: Whether left and right are swapped, after ``box``.
        color: Colour change, applied to the canvases.
    """

    size: Size
    canvases: tuple[Canvas, ...]
    crops: tuple[Crop, ...]
    box: Box | None = None
    flip: bool = False
    color: ColorChange | None = None

    @functools.cached_property
    def needed_size(self) -> Size:
        """Smallest (height, width) at which the image can be decoded without enlarging it for a canvas."""
        kept = self.size if self.box is None else self.box[2:]
        # Rounded up: -(-a // b).
        height, width = (
            max(
                -(-canvas.steps[0][axis] * self.size[axis] // kept[axis])
                for canvas in self.canvases
                if canvas.source is None
            )
            for axis in (0, 1)
        )
        return height, width


def render(
    pixels: Pixels, plan: ImagePlan, patch_size: int, interpolation: str, out: Sequence[npt.NDArray[np.uint8]]
) -> None:
    """Render the plan, and write the patches of each crop to ``out``.

    Args:
        pixels: The decoded image, of ``plan.size``, or smaller if the decoder scaled it.
        plan: The plan of this image.
        patch_size: Side of a patch in pixels.
        interpolation: Resize filter.
        out: One writable uint8 array ``(P, patch_dim)`` per crop.
    """
    if plan.box is not None:
        top, left, height, width = plan.box
        if pixels.shape[:2] != plan.size:  # The decoder scaled the image.
            down, right = pixels.shape[0] / plan.size[0], pixels.shape[1] / plan.size[1]
            top, left = round(top * down), round(left * right)
            height, width = max(1, round(height * down)), max(1, round(width * right))
        pixels = crop_to_box(pixels, (top, left, height, width))
    if plan.flip:
        pixels = pixels[:, ::-1].copy()  # ascontiguousarray keeps the negative stride of a single column.
    canvases: list[Pixels] = []
    resized = dict[tuple[Size, ...], Pixels]({(): pixels})
    for canvas in plan.canvases:
        if canvas.source is None:
            for done, size in enumerate(canvas.steps):
                before, now = canvas.steps[:done], canvas.steps[: done + 1]
                if now not in resized:  # Canvases may share their first steps.
                    resized[now] = resize(resized[before], size, interpolation)
            drawn = resized[canvas.steps]
        else:
            drawn = resize(crop_to_box(canvases[canvas.source[0]], canvas.source[1]), canvas.content, interpolation)
        if canvas.content != canvas.size:
            plane = np.full((*canvas.size, 3), canvas.fill, dtype=np.uint8)
            top, left = canvas.at
            plane[top : top + canvas.content[0], left : left + canvas.content[1]] = drawn
            drawn = plane
        color = plan.color if canvas.source is None else None  # A part of a canvas has its colours already.
        canvases.append(drawn if color is None else color(drawn))
    for crop, patches in zip(plan.crops, out, strict=True):
        height, width = crop.grid[1] * patch_size, crop.grid[2] * patch_size
        patchify(
            canvases[crop.canvas][crop.top : crop.top + height, crop.left : crop.left + width], patch_size, patches
        )


def crop_to_box(pixels: Pixels, box: Box) -> Pixels:
    """Return the part of the image inside ``box``, filled with white outside the image; a view if it is all inside."""
    top, left, height, width = box
    inside = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inside.shape[:2] == (height, width):
        return inside
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    y, x = max(0, -top), max(0, -left)
    canvas[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return canvas


def resize(pixels: Pixels, size: Size, interpolation: str = "bicubic") -> Pixels:
    """Resize with antialiasing. Returns ``pixels`` itself if the size is right.

    The width is resized first, then the height, with a rounding to bytes in between. The result is byte-identical to
    torchvision's. Compared with Pillow's, about one value in 400 differs by 1, which is a PSNR of 74 dB. Over 300
    random sizes, the PSNR is 67 to 98 dB. From version 13 on, Pillow resizes the height of tall images first, and the
    PSNR is 55 dB. Neither order is closer to the result without rounding.

    ``bilinear_float`` is torchvision's bilinear resize of float32 images, which rounds to bytes only at the end. Before
    version 2.12, torch has no Lanczos filter, and Pillow's is used.
    """
    return resize_all([pixels], size, interpolation)[0]


def resize_all(images: Sequence[Pixels], size: Size, interpolation: str = "bicubic") -> Sequence[Pixels]:
    """Resize images of one size as ``resize``. One call for several small images saves a third of the time."""
    if images[0].shape[:2] == size:
        return images
    if interpolation == "lanczos" and not TORCH_HAS_LANCZOS:
        wide = [Image.fromarray(each).resize((size[1], len(each)), Image.Resampling.LANCZOS) for each in images]
        return [np.asarray(each.resize((size[1], size[0]), Image.Resampling.LANCZOS)) for each in wide]
    joined = np.stack(images) if len(images) > 1 else np.ascontiguousarray(images[0])
    # Memory in channels-last order selects the SIMD kernel. torch writes its result in this order too if the strides of
    # all axes say so. Otherwise it converts the result to planes, which takes a third of the time.
    height, width, channels = images[0].shape
    strides = (height * width * channels, 1, width * channels, channels)
    planes = torch.from_numpy(joined).as_strided((len(images), channels, height, width), strides)
    if interpolation == "bilinear_float":
        out = _bilinear_float(planes, size)
    else:
        out = F.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return list(out.numpy().transpose(0, 2, 3, 1))


def _bilinear_float(planes: torch.Tensor, size: Size) -> torch.Tensor:
    """Resize with torchvision, because ``interpolate`` is wrong for float images that become one pixel wide."""
    from torchvision.transforms.v2.functional import InterpolationMode, resize_image

    resized = resize_image(planes.float(), list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized.round().to(torch.uint8)


def patchify(pixels: Pixels, patch_size: int, out: npt.NDArray[np.uint8]) -> None:
    """Write ``pixels`` ``(H, W, C)`` to ``out`` ``(P, C * patch_size**2)``.

    Patches are in row-major order; the values of a patch are in the order (channel, row, column). H and W must be
    multiples of ``patch_size``.
    """
    height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    # Each row of a patch is contiguous in planes. Copies of such rows save more time than the copy to planes takes.
    patch_row = np.dtype((np.void, patch_size))
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).view(patch_row)
    patches = out.reshape(rows, columns, channels, patch_size, patch_size).view(patch_row)[..., 0]
    np.copyto(patches, planes.reshape(channels, rows, patch_size, columns).transpose(1, 3, 0, 2))
