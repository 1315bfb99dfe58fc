"""Image to views: decode, augment, resize, cut into patches.

    fixed    one view of a fixed size
    native   one view at the image's own aspect, sides rounded to what the tower merges
    tiles    a thumbnail, and up to ``max_tiles`` tiles of the best-fitting grid

Which views are embedded and which are attended follows from ``MediaSpec.placement``. Randomness comes from one
generator that the caller keys by sample, so a view is a pure function. Not for: text (``template``).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data_pipeline.augment import AugmentConfig, crop_box, jitter
from data_pipeline.decode.image import DecodeMode, decode_image, too_many_pixels
from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.image_header import image_size
from data_pipeline.strict import StrictConfig
from data_pipeline.views import Canvas, ImagePlan, Size, View, render

_BLACK = np.uint8(0)


class _TransformConfig(StrictConfig):
    """What every transform has."""

    decode: DecodeMode = DecodeMode.EXACT
    """``exact`` decodes every pixel with torchvision; ``fast`` lets JPEGs be scaled while decoding."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resize filter, always antialiased."""
    max_image_pixels: int = Field(default=1 << 26, ge=1)
    """Refuse larger stored images by their header (decompression bombs); pixels."""
    augment: AugmentConfig | None = None
    """Random changes in training; evaluation never applies them."""


class FixedTransform(_TransformConfig):
    """One view of ``size x size`` pixels."""

    kind: Literal["fixed"] = "fixed"
    size: int | None = Field(default=None, ge=1)
    """Side, pixels; a multiple of patch size times merge. None takes the vision tower's fixed size."""
    keep_aspect: bool = False
    """Pad the shorter side with white instead of stretching the image to a square."""


class NativeTransform(_TransformConfig):
    """One view at the image's aspect, at native resolution where the limits allow it.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, naive dynamic resolution.
    """

    kind: Literal["native"] = "native"
    min_pixels: int = Field(default=56 * 56, ge=1)
    """Smaller images are enlarged to at least this many pixels."""
    max_pixels: int = Field(default=1280 * 28 * 28, ge=1)
    """Larger images are reduced to at most this many pixels."""
    max_aspect: float = Field(default=200.0, ge=1)
    """Longer side over shorter side; beyond it a sample is refused."""


class TilesTransform(_TransformConfig):
    """A thumbnail and a grid of tiles, each of ``size x size`` pixels.

    Source: InternVL 1.5 (arXiv 2404.16821), section 3.2; NVLM (arXiv 2409.11402), section 4.
    """

    kind: Literal["tiles"] = "tiles"
    size: int | None = Field(default=None, ge=1)
    """Side of a tile, pixels. None takes the vision tower's fixed size."""
    max_tiles: int = Field(default=6, ge=1)
    """Tiles of an image at most, without the thumbnail."""


TransformConfig = Annotated[FixedTransform | NativeTransform | TilesTransform, Field(discriminator="kind")]


def smart_size(height: int, width: int, multiple: int, min_pixels: int, max_pixels: int) -> Size:
    """Sides rounded to ``multiple``, their product within the limits, the aspect kept as well as that allows."""
    new_height = max(multiple, round(height / multiple) * multiple)
    new_width = max(multiple, round(width / multiple) * multiple)
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / multiple) * multiple
        new_width = math.ceil(width * grow / multiple) * multiple
    if new_height * new_width > max_pixels:  # Of limits too close for both, this one holds: it bounds memory.
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(multiple, math.floor(height / shrink / multiple) * multiple)
        new_width = max(multiple, math.floor(width / shrink / multiple) * multiple)
        # A side that was lifted to one multiple leaves less for the other.
        if new_height * new_width > max_pixels:
            if new_height > new_width:
                new_height = max_pixels // (new_width * multiple) * multiple
            else:
                new_width = max_pixels // (new_height * multiple) * multiple
    return new_height, new_width


def tile_grid(height: int, width: int, max_tiles: int, size: int) -> tuple[int, int]:
    """Rows and columns of at most ``max_tiles`` tiles whose aspect is nearest to the image's.

    Of equally near grids the larger one wins if the image has pixels for at least half of it.
    """
    aspect = math.log(width / height)
    best, best_gap = (1, 1), abs(aspect)
    grids = ((r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1))
    for rows, columns in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        gap = abs(aspect - math.log(columns / rows))
        tie = math.isclose(gap, best_gap, abs_tol=1e-9) and height * width > 0.5 * size * size * rows * columns
        if tie or gap < best_gap - 1e-9:
            best, best_gap = (rows, columns), gap
    return best


class ImageTransform:
    """Encoded image to the views of one data set.

    Args:
        config: Transform of the data set.
        spec: What the model takes.

    Raises:
        DataConfigError: the transform cannot give views that the model takes.
    """

    def __init__(self, config: TransformConfig, spec: MediaSpec) -> None:
        if spec.channels != 3:
            raise DataConfigError(f"the model takes {spec.channels} channels, images are decoded to 3 (RGB)")
        self.config = config
        self.spec = spec
        self._size = 0
        if isinstance(config, NativeTransform):
            self._check_native(config)
        else:
            self._size = self._fixed_size(config)

    def _check_native(self, config: NativeTransform) -> None:
        if self.spec.fixed_grid is not None:
            raise DataConfigError("transforms.kind=native: the vision tower has a fixed size; use fixed or tiles")
        least = self.spec.size_multiple**2
        if config.max_pixels < max(least, config.min_pixels):
            raise DataConfigError(
                f"transforms.max_pixels={config.max_pixels}: must be at least min_pixels={config.min_pixels} and one "
                f"merged patch, {least} pixels"
            )

    def _fixed_size(self, config: FixedTransform | TilesTransform) -> int:
        grid = self.spec.fixed_grid
        if config.size is None:
            if grid is None or grid[0] != grid[1]:
                raise DataConfigError(
                    "transforms.size is missing, and the vision tower has no fixed square size to take"
                )
            return grid[0] * self.spec.patch_size
        side = config.size // self.spec.patch_size
        if config.size % self.spec.size_multiple:
            raise DataConfigError(
                f"transforms.size={config.size}: must be a multiple of patch size x merge = {self.spec.size_multiple}"
            )
        if grid is not None and grid != (side, side):
            need = f"{grid[0] * self.spec.patch_size}x{grid[1] * self.spec.patch_size}"
            raise DataConfigError(f"transforms.size={config.size}: the vision tower takes {need} pixels")
        return config.size

    def __call__(
        self, data: bytes, rng: np.random.Generator | None = None, expected: Size | None = None
    ) -> tuple[MediaItem, ...]:
        """Views of one encoded image, in reading order.

        Args:
            data: The encoded image.
            rng: Draws the augmentation; None applies none.
            expected: Height and width that the shard's index promised, if it did.

        Raises:
            SampleError: the image cannot be decoded, is refused, or is not what the index says.
        """
        config = self.config
        header = image_size(data)
        size = (header.height, header.width)
        if expected is not None and expected != size:
            raise SampleError(
                f"an image of {size[1]}x{size[0]} pixels, the index says {expected[1]}x{expected[0]}: an older index? "
                "Build it again with: mmscale data index",
                kind=FaultKind.DECODE,
            )
        plan = self.plan(size, rng)
        pixels = decode_image(
            data,
            mode=config.decode,
            max_pixels=config.max_image_pixels,
            min_side=plan.needed_size() if config.decode is DecodeMode.FAST else None,
        )
        if pixels.shape[:2] != plan.size and config.decode is not DecodeMode.FAST:
            height, width = pixels.shape[:2]
            raise SampleError(
                f"its header says {header.width}x{header.height} pixels, the decoder gave {width}x{height}",
                kind=FaultKind.DECODE,
            )
        values = render(pixels, plan, self.spec.patch_size, config.interpolation)
        return tuple(
            MediaItem(patches, view.grid, view.embedded) for patches, view in zip(values, plan.views, strict=True)
        )

    def measure(self, size: Size, rng: np.random.Generator | None = None) -> tuple[MediaItem, ...]:
        """The views that an image of this size gives, with black pixels that take no memory.

        Draws from ``rng`` exactly as the image itself would.

        Args:
            size: Height and width as shown, as ``image_header.image_size`` and the shard's index give them.
            rng: As for the image.

        Raises:
            SampleError: the image is refused by its size.
        """
        if size[0] < 1 or size[1] < 1:
            raise SampleError("the index holds no size of this image: its header is damaged", kind=FaultKind.DECODE)
        plan, patch_dim = self.plan(size, rng), self.spec.patch_dim
        return tuple(
            MediaItem(np.broadcast_to(_BLACK, (math.prod(view.grid), patch_dim)), view.grid, view.embedded)
            for view in plan.views
        )

    def plan(self, size: Size, rng: np.random.Generator | None = None) -> ImagePlan:
        """What becomes of an image of ``size``: a pure function of it and of the draws.

        Raises:
            SampleError: the image is refused by its size.
        """
        if size[0] * size[1] > self.config.max_image_pixels:
            raise too_many_pixels(size[1], size[0], self.config.max_image_pixels)
        augment = self.config.augment
        if augment is None or rng is None:
            return ImagePlan(size, *self._layout(size))
        box = crop_box(size, augment, rng)
        flip = rng.random() < augment.flip
        color = jitter(augment, rng)
        return ImagePlan(size, *self._layout(box[2:]), box, flip, color)

    def _layout(self, size: Size) -> tuple[tuple[Canvas, ...], tuple[View, ...]]:
        """Canvases and views of what is left after the crop."""
        whole, tiled, grid = self._whole(size), None, (1, 1)
        if isinstance(self.config, TilesTransform):
            grid = tile_grid(*size, self.config.max_tiles, self._size)
        if grid != (1, 1):  # Of one tile the thumbnail says it all.
            sides = (grid[0] * self._size, grid[1] * self._size)
            tiled = Canvas(sides, sides)
        placement = self.spec.placement
        first = self._view(0, 0, 0, whole.size, embedded=placement is not Placement.CROSS_ATTENTION)
        if tiled is None:
            again = (replace(first, embedded=False),) if placement is Placement.HYBRID else ()
            return (whole,), (first, *again)
        tiles = (
            self._view(
                1, row * self._size, column * self._size, (self._size, self._size), placement is Placement.EMBEDDING
            )
            for row in range(grid[0])
            for column in range(grid[1])
        )
        return (whole, tiled), (first, *tiles)

    def _view(self, canvas: int, top: int, left: int, size: Size, embedded: bool) -> View:
        patch = self.spec.patch_size
        return View(canvas, top, left, (1, size[0] // patch, size[1] // patch), embedded)

    def _whole(self, size: Size) -> Canvas:
        """The canvas of the whole image."""
        config, (height, width) = self.config, size
        if isinstance(config, NativeTransform):
            if max(height, width) > config.max_aspect * min(height, width):
                raise SampleError(
                    f"an image of {width}x{height} pixels, the longest aspect taken is {config.max_aspect:g}",
                    kind=FaultKind.DECODE,
                )
            smart = smart_size(height, width, self.spec.size_multiple, config.min_pixels, config.max_pixels)
            return Canvas(smart, smart)
        side = self._size
        if isinstance(config, FixedTransform) and config.keep_aspect and height != width:
            longest = max(height, width)
            content = (max(1, round(height * side / longest)), max(1, round(width * side / longest)))
            return Canvas(content, (side, side), ((side - content[0]) // 2, (side - content[1]) // 2))
        return Canvas((side, side), (side, side))
