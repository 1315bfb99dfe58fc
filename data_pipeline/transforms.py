"""Image to views: decode, augment, resize, cut into patches.

    fixed    one view of a fixed size
    native   one view at the image's own aspect, sides rounded to what the tower merges
    tiles    a thumbnail, and up to ``max_tiles`` tiles of the best-fitting grid

Which views are embedded and which are attended follows from ``MediaSpec.placement``. Randomness comes from one
generator that the caller keys by sample, so a view is a pure function. Not for: text (``template``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field

from data_pipeline.augment import AugmentConfig, crop_box, cut, jitter
from data_pipeline.decode.image import DecodeMode, Pixels, decode_image
from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.shards.image_header import image_size
from data_pipeline.strict import StrictConfig

Size = tuple[int, int]
"""Height and width, pixels."""


class _TransformConfig(StrictConfig):
    """What every transform has."""

    decode: DecodeMode = DecodeMode.PARITY
    """``parity`` decodes every pixel with torchvision; ``fast`` lets JPEGs be scaled while decoding."""
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


def resize(pixels: Pixels, size: Size, interpolation: str = "bicubic") -> Pixels:
    """Antialiased resize; ``pixels`` itself if it already fits."""
    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[
        None
    ]  # A channels-last view: the SIMD path.
    out = F.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return out[0].permute(1, 2, 0).contiguous().numpy()


def patchify(pixels: Pixels, patch_size: int) -> npt.NDArray[np.uint8]:
    """``(H, W, C)`` to ``(P, C * patch_size**2)``: patches row-major, each in order (channel, row, column)."""
    height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    split = pixels.reshape(rows, patch_size, columns, patch_size, channels)
    return split.transpose(0, 2, 4, 1, 3).reshape(rows * columns, channels * patch_size**2)


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

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> tuple[MediaItem, ...]:
        """Views of one encoded image, embedded ones first; ``rng`` None applies no augmentation.

        Raises:
            SampleError: the image cannot be decoded or is refused.
        """
        config = self.config
        pixels = decode_image(
            data, mode=config.decode, max_pixels=config.max_image_pixels, min_side=self._min_side(data, rng is not None)
        )
        augment = config.augment
        if augment is None or rng is None:
            return tuple(self._item(view, embedded) for view, embedded in self._views(pixels))
        pixels = cut(pixels, crop_box(pixels.shape[:2], augment, rng))
        if rng.random() < augment.flip:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        change = jitter(augment, rng)  # At the final size, where pixels are fewest.
        return tuple(self._item(change(view), embedded) for view, embedded in self._views(pixels))

    def _min_side(self, data: bytes, training: bool) -> Size | None:
        """Height and width that the views need of the decoded image."""
        config = self.config
        if config.decode is DecodeMode.PARITY:
            return None
        if isinstance(config, NativeTransform):
            _, width, height = image_size(data)
            size = smart_size(height, width, self.spec.size_multiple, config.min_pixels, config.max_pixels)
        else:
            tiles = config.max_tiles if isinstance(config, TilesTransform) else 1
            size = (self._size * tiles, self._size * tiles)
        crop = config.augment.scale[0] if training and config.augment is not None else 1.0
        return math.ceil(size[0] / min(1.0, crop)), math.ceil(size[1] / min(1.0, crop))

    def _item(self, view: Pixels, embedded: bool) -> MediaItem:
        patch = self.spec.patch_size
        return MediaItem(patchify(view, patch), (1, view.shape[0] // patch, view.shape[1] // patch), embedded)

    def _views(self, pixels: Pixels) -> Iterator[tuple[Pixels, bool]]:
        """Views with whether each is embedded."""
        whole = self._whole(pixels)
        tiles = self._tiles(pixels)
        placement = self.spec.placement
        if placement is Placement.HYBRID:
            yield whole, True
            yield from ((tile, False) for tile in tiles or [whole])
        else:
            embedded = placement is Placement.EMBEDDING
            yield whole, embedded
            yield from ((tile, embedded) for tile in tiles)

    def _whole(self, pixels: Pixels) -> Pixels:
        config, (height, width) = self.config, pixels.shape[:2]
        if isinstance(config, NativeTransform):
            if max(height, width) > config.max_aspect * min(height, width):
                raise SampleError(
                    f"an image of {width}x{height} pixels, the longest aspect taken is {config.max_aspect:g}"
                )
            size = smart_size(height, width, self.spec.size_multiple, config.min_pixels, config.max_pixels)
            return resize(pixels, size, config.interpolation)
        if isinstance(config, FixedTransform) and config.keep_aspect and height != width:
            side = max(height, width)
            top, left = (side - height) // 2, (side - width) // 2
            pixels = cut(pixels, (-top, -left, side, side))
        return resize(pixels, (self._size, self._size), config.interpolation)

    def _tiles(self, pixels: Pixels) -> list[Pixels]:
        """The tiles; none where the thumbnail alone says it all."""
        config, size = self.config, self._size
        if not isinstance(config, TilesTransform):
            return []
        rows, columns = tile_grid(pixels.shape[0], pixels.shape[1], config.max_tiles, size)
        if rows * columns == 1:
            return []
        canvas = resize(pixels, (rows * size, columns * size), config.interpolation)
        return [
            canvas[r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(rows) for c in range(columns)
        ]
