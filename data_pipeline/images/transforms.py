"""Convert an encoded image to crops: decode, augment, resize, and cut into patches.

    fixed                            one crop of a fixed size
    native, longest_side, padded     one crop at the image's own aspect, in whole patches (``native_sizes``)
    scaled                           crops with a longer side of one length, of the image or its parts (``splits``)
    tiles                            tiles of one size by a published rule, most with an overview (``tilings``)

``MediaSpec.placement`` determines which crops are embedded and which are attended. All randomness comes from the sample
RNG that the caller passes, so crops are a pure function of the image, the configuration and that generator.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.document import MediaItem
from data_pipeline.errors import DataConfigError, FaultKind, SampleError
from data_pipeline.images.crops import AugmentConfig, Canvas, Color, Crop, ImagePlan, content_area, on_square, render
from data_pipeline.images.decode import DecodeMode, Scratch, decode_image, too_many_pixels
from data_pipeline.images.image_tokens import ImageLayoutConfig
from data_pipeline.images.native_sizes import Size, area_size, longest_side_size, round_up, shrunk_size
from data_pipeline.images.splits import ScaledCrop, SplitConfig
from data_pipeline.images.tilings import InternvlTiling, Tile, Tiled, Tiles, TilingConfig, single_tile
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.randomness import Rng
from data_pipeline.shards.image_header import ImageSize, image_size

_BLACK = np.uint8(0)
_MAX_CACHED_PLANS = 1024
"""Plans without randomness, cached by size: most data sets have few image sizes."""


class _TransformConfig(StrictConfig):
    """Keys that all transforms share."""

    decode: DecodeMode = DecodeMode.EXACT
    """``exact`` decodes every pixel, byte-identical to Pillow; ``fast`` may decode large JPEGs at a reduced size."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "bilinear_float"] = "bicubic"
    """Resize filter, always antialiased. Values are rounded to bytes after the resize of the width and again after that
    of the height. ``bilinear_float`` (Molmo) rounds only once, at the end."""
    max_image_pixels: int = Field(default=1 << 26, ge=1)
    """Largest number of pixels of a stored image. A larger one is a bad sample, found by its header before decoding."""
    augment: AugmentConfig | None = None
    """Random changes of training images. null for none; evaluation does not apply them."""
    layout: ImageLayoutConfig | None = None
    """Tokens around, between and before the features of an image; null for none."""


class FixedTransform(_TransformConfig):
    """One crop of ``size x size`` pixels."""

    kind: Literal["fixed"] = "fixed"
    size: int | None = Field(default=None, ge=1)
    """Side in pixels, a multiple of patch size times merge. null uses the vision tower's fixed size."""
    keep_aspect: bool = False
    """Pad the shorter side with ``background`` instead of stretching the image to a square."""
    background: Color = (255, 255, 255)
    """Red, green and blue of the padding, each from 0 to 255: white by default, [127, 127, 127] (Janus)."""
    min_side: int = Field(default=1, ge=1, le=1 << 16)
    """Least shorter side of the image inside the padding, in pixels: 14 (Janus). A narrower image is stretched."""
    crop: Literal["center", "random"] | None = None
    """Resize the shorter side to ``size`` and crop a square (CLIP). ``center``: from the middle. ``random``: from a
    random position in training, else from the middle. null uses the whole image."""

    @model_validator(mode="after")
    def _one_way(self) -> FixedTransform:
        if self.keep_aspect and self.crop is not None:
            raise ValueError("keep_aspect pads the image and crop cuts it; set only one of them")
        if not self.keep_aspect and (self.background, self.min_side) != ((255, 255, 255), 1):
            raise ValueError("background, min_side: only keep_aspect pads an image; set keep_aspect: true")
        return self


class NativeTransform(_TransformConfig):
    """One crop at the image's aspect, at native resolution if its area is within the limits.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, naive dynamic resolution.
    """

    kind: Literal["native"] = "native"
    min_pixels: int = Field(default=56 * 56, ge=1)
    """Images with fewer pixels are enlarged to at least this many; at least 1."""
    max_pixels: int = Field(default=1280 * 28 * 28, ge=1)
    """Images with more pixels are reduced to at most this many. At least ``min_pixels`` and one merged patch."""
    max_aspect: float = Field(default=200.0, ge=1)
    """Largest ratio of the longer side to the shorter side, at least 1. A sample above it is a bad sample."""


class LongestSideTransform(_TransformConfig):
    """One crop at native resolution, with its longer side within a limit, slightly stretched to whole patches.

    Source: Pixtral (arXiv 2410.07073), section 2.
    """

    kind: Literal["longest_side"] = "longest_side"
    longest: int = Field(default=1024, ge=1)
    """Longest side in pixels, a multiple of patch size times merge. Larger images are reduced to it."""


class PaddedTransform(_TransformConfig):
    """One crop at native resolution within a largest size, padded at the right and the bottom to whole patches.

    Source: Fuyu-8B's model card and its image processor.
    """

    kind: Literal["padded"] = "padded"
    max_height: int = Field(default=1080, ge=1)
    """Largest height in pixels, a multiple of patch size times merge. Larger images are reduced, with aspect kept."""
    max_width: int = Field(default=1920, ge=1)
    """Largest width in pixels, a multiple of patch size times merge."""


class TilesTransform(_TransformConfig):
    """Tiles of ``size x size`` pixels by a published rule, most with an overview."""

    kind: Literal["tiles"] = "tiles"
    size: int | None = Field(default=None, ge=1)
    """Side of a tile in pixels, a multiple of patch size times merge; null uses the vision tower's fixed size. With
    ``tiling.kind: idefics3`` it may have pixels beyond the last whole patch, which the tower does not read (SmolVLM
    2.2B: 384, of which it reads 378)."""
    tiling: TilingConfig = InternvlTiling()
    """Tiling rule: ``internvl`` (also NVLM), ``llama``, ``molmo``, ``mm1_5`` or ``idefics3`` (also SmolVLM)."""
    split_up_to: int | None = Field(default=None, ge=1)
    """Largest number of images in a sample whose images are split, at least 1 (MM1.5: 2). In a sample with more images,
    each has at most one tile. null splits all images."""


class ScaledTransform(_TransformConfig):
    """Crops whose longer side has one length, padded with black at the right and the bottom to whole patches.

    Source: Aria (arXiv 2410.05993), section 2.2, and its image processor.
    """

    kind: Literal["scaled"] = "scaled"
    longer: int = Field(default=980, ge=1)
    """Longer side of every crop in pixels, a multiple of patch size times merge: 490 or 980 in Aria. The aspect is
    kept."""
    shorter: int = Field(default=336, ge=1)
    """Least shorter side of a crop in pixels, at most ``longer``. A narrower image is stretched to it."""
    split: SplitConfig | None = None
    """Rule by which an image is split into crops (``nearest_aspect``: the authors' code; ``most_pixels``:
    transformers). null: one crop of the whole image."""

    @model_validator(mode="after")
    def _ordered(self) -> ScaledTransform:
        if self.shorter > self.longer:
            raise ValueError(f"shorter={self.shorter} is above longer={self.longer}")
        return self


_NATIVE = (NativeTransform, LongestSideTransform, PaddedTransform, ScaledTransform)
_Native = NativeTransform | LongestSideTransform | PaddedTransform | ScaledTransform
TransformConfig = Annotated[
    FixedTransform | NativeTransform | LongestSideTransform | PaddedTransform | ScaledTransform | TilesTransform,
    Field(discriminator="kind"),
]
_Layout = tuple[tuple[Canvas, ...], tuple[Crop, ...]]
"""Canvases, and the crops that are cut from them."""
_FUYU_FILL = 1  # Fuyu's image processor pads with 1 before it divides by 255.


class ImageTransform:
    """Converts the encoded images of one data set to crops.

    Args:
        config: Transform of the data set.
        spec: Requirements of the model.

    Attributes:
        grids: Grids of tiles that an image may have; empty for a transform without tiles.

    Raises:
        DataConfigError: the model cannot use the crops of this transform.
    """

    def __init__(self, config: TransformConfig, spec: MediaSpec) -> None:
        if spec.channels != 3:
            raise DataConfigError(f"the model takes {spec.channels} channels, images are decoded to 3 (RGB)")
        self.config = config
        self.spec = spec
        self.scratch = Scratch()
        self._cached_plan = functools.lru_cache(maxsize=_MAX_CACHED_PLANS)(self._fixed_plan)
        self.grids: tuple[Tiles, ...] = ()
        self._size = 0
        self._stretched: _Layout | None = None  # Layout of all images, if the transform stretches them to one square.
        if isinstance(config, _NATIVE):
            self._check_native(config)
            return
        self._size = self._fixed_size(config)
        if isinstance(config, FixedTransform) and config.crop is None and not config.keep_aspect:
            self._stretched = self._layout((self._size, self._size), 1)
        if isinstance(config, TilesTransform):
            config.tiling.check(self._size, spec)
            self.grids = config.tiling.grids(self._size)
            self._check_tiles(config, spec)
            if spec.placement is Placement.HYBRID and not config.tiling.has_overview:
                raise DataConfigError(
                    f"transforms.tiling.kind={config.tiling.kind}: has no overview, and the model (connector.kind="
                    "hybrid) writes overviews into token slots; use another tiling or connector"
                )

    def _check_tiles(self, config: TilesTransform, spec: MediaSpec) -> None:
        if spec.placement is Placement.PAIR:
            raise DataConfigError(
                "transforms.kind=tiles: the model (connector.kind=contrastive) compares one crop of an image with its "
                "text; use fixed, or native where the tower takes any size"
            )
        if spec.max_tiles is None:
            return
        if config.tiling.has_overview:
            raise DataConfigError(
                f"transforms.tiling.kind={config.tiling.kind}: has an overview, but the vision tower (vision.tiles) "
                "accepts only tiles; use kind: llama"
            )
        if (most := max(rows * columns for rows, columns in self.grids)) > spec.max_tiles:
            raise DataConfigError(
                f"transforms.tiling.max_tiles={most}: the vision tower accepts at most "
                f"{spec.max_tiles} (vision.tiles.max_tiles)"
            )

    def _check_native(self, config: _Native) -> None:
        if self.spec.fixed_grid is not None:
            raise DataConfigError(
                f"transforms.kind={config.kind}: the vision tower has a fixed size; use fixed or tiles"
            )
        if isinstance(config, NativeTransform):
            self._check_area(config)
            return
        for name in ("longest", "max_height", "max_width", "longer"):
            self._check_side(name, getattr(config, name, 0))
        if isinstance(config, ScaledTransform) and config.split is not None:
            config.split.check(self.spec)

    def _check_side(self, name: str, side: int) -> None:
        if side % self.spec.size_multiple:
            raise DataConfigError(
                f"transforms.{name}={side}: must be a multiple of patch size x merge = {self.spec.size_multiple}"
            )
        if (largest := self.spec.largest_side) is not None and side > largest:
            raise DataConfigError(
                f"transforms.{name}={side}: the model takes crops of at most {largest} pixels a side "
                "(connector.projector.queries)"
            )

    def _check_area(self, config: NativeTransform) -> None:
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
        if isinstance(config, TilesTransform) and config.tiling.allows_leftover_pixels and grid == (side, side):
            return config.size
        self._check_side("size", config.size)
        if grid is not None and grid != (side, side):
            need = f"{grid[0] * self.spec.patch_size}x{grid[1] * self.spec.patch_size}"
            raise DataConfigError(f"transforms.size={config.size}: the vision tower takes {need} pixels")
        return config.size

    def __call__(
        self, data: bytes, rng: Rng | None = None, expected: Size | None = None, num_images: int = 1
    ) -> tuple[MediaItem, ...]:
        """Return the crops of one encoded image, in reading order.

        Args:
            data: The encoded image.
            rng: Sample RNG for random changes; None makes none.
            expected: (height, width) from the shard's index, if known.
            num_images: Number of images in the sample, including this one.

        Raises:
            SampleError: the image cannot be decoded, is too large or too elongated, or does not have the size in the
                index.
        """
        task = self.decode_task(data, rng, expected, num_images)
        task.decode()
        return task.crops

    def decode_task(
        self,
        data: bytes,
        rng: Rng | None = None,
        expected: Size | None = None,
        num_images: int = 1,
    ) -> DecodeTask:
        """Plan an image, and return a task that decodes it later.

        Args:
            data, rng, expected, num_images: As in ``__call__``.

        Raises:
            SampleError: the header is damaged, or the image is too large, too elongated or does not have the size in
                the index.
        """
        header = image_size(data)
        size = (header.height, header.width)
        if expected is not None and expected != size:
            raise SampleError(
                f"an image of {size[1]}x{size[0]} pixels, the index says {expected[1]}x{expected[0]}; if the index "
                "is old, build it again with: mmscale data index",
                kind=FaultKind.DECODE,
            )
        plan = self.plan(size, rng, num_images)
        return DecodeTask(self, data, header, plan, self.items(plan, is_black=False))

    def dry_run(self, size: Size, rng: Rng | None = None, num_images: int = 1) -> tuple[MediaItem, ...]:
        """Return the crops of an image of this size with black pixels, which take no memory.

        Advances ``rng`` exactly as ``decode_task`` does.

        Args:
            size: (height, width) after the EXIF rotation, as from ``image_header.image_size`` and the shard's index.
            rng, num_images: As in ``__call__``.

        Raises:
            SampleError: the size is unknown (0), or the image is too large or too elongated.
        """
        if size[0] < 1 or size[1] < 1:
            raise SampleError(
                "the index has no size for this image, because its header is damaged", kind=FaultKind.DECODE
            )
        return self.items(self.plan(size, rng, num_images), is_black=True)

    def items(self, plan: ImagePlan, is_black: bool) -> tuple[MediaItem, ...]:
        """Return the crops of a plan, with uninitialised values, or with black ones that take no memory."""
        items = []
        for crop in plan.crops:
            shape = (math.prod(crop.grid), self.spec.patch_dim)
            values = np.broadcast_to(_BLACK, shape) if is_black else np.empty(shape, np.uint8)
            items.append(
                MediaItem(values, crop.grid, crop.embedded, crop.kept_region, crop.cell, crop.content_area, crop.tiles)
            )
        return tuple(items)

    def plan(self, size: Size, rng: Rng | None = None, num_images: int = 1) -> ImagePlan:
        """Return the plan of an image of ``size`` in a sample of ``num_images`` images.

        The plan is a pure function of the arguments; ``rng`` is advanced. With ``rng`` None, nothing is random.

        Raises:
            SampleError: the image is too large or too elongated.
        """
        if size[0] * size[1] > self.config.max_image_pixels:
            raise too_many_pixels(size[1], size[0], self.config.max_image_pixels)
        augment = self.config.augment
        is_random_crop = isinstance(self.config, FixedTransform) and self.config.crop == "random"
        if rng is None or (augment is None and not is_random_crop):
            return self._cached_plan(size, num_images)
        at = rng.random() if is_random_crop else None
        if augment is None:
            return ImagePlan(size, *self._layout(size, num_images, at))
        box, flip, color = augment.draw(size, rng)
        return ImagePlan(size, *(self._stretched or self._layout(box[2:], num_images, at)), box, flip, color)

    def _fixed_plan(self, size: Size, num_images: int) -> ImagePlan:
        return ImagePlan(size, *self._layout(size, num_images))

    def _layout(self, size: Size, num_images: int, at: float | None = None) -> _Layout:
        """Return canvases and crops for ``size``, that of the image or of its box; ``at`` as in ``_square_crop``."""
        config, placement = self.config, self.spec.placement
        if isinstance(config, TilesTransform):
            split = config.split_up_to is None or num_images <= config.split_up_to
            tiling = config.tiling if split else single_tile(config.tiling)
            tiled = tiling.plan(size, self._size, self.spec)
        elif isinstance(config, FixedTransform) and config.crop is not None:
            tiled = self._square_crop(size, at)
        elif isinstance(config, ScaledTransform) and config.split is not None:
            tiled = config.split.plan(size, ScaledCrop(config.longer, config.shorter, self.spec.size_multiple))
        else:
            tiled = Tiled((self._whole(size),), (Tile(0, 0, 0, None),))
        tiles = tiled.tiles
        if placement is Placement.HYBRID and len(tiles) == 1:  # The single crop is used as overview and as tile.
            tiles = (tiles[0], replace(tiles[0], cell=(0, 0)))
            roles = [True, False]
        else:
            roles = [
                placement is Placement.EMBEDDING or (placement is Placement.HYBRID and tile.cell is None)
                for tile in tiles
            ]
        tiling_grid, crops = tiled.grid, []
        for tile, embedded in zip(tiles, roles, strict=True):
            canvas, patch = tiled.canvases[tile.canvas], self.spec.patch_size
            height, width = canvas.size if isinstance(config, _NATIVE) else (self._size, self._size)
            rows, columns = height // patch, width // patch
            area = content_area(canvas, tile.top, tile.left, rows, columns, patch) if self.spec.padding else None
            grid = (1, rows, columns)
            place = (tile.canvas, tile.top, tile.left, grid)
            crops.append(Crop(*place, embedded, tile.kept_region, tile.cell, area, tiling_grid))
        if self.spec.padding and isinstance(config, TilesTransform):
            return tiled.canvases, config.tiling.with_reported_padding(tuple(crops))
        return tiled.canvases, tuple(crops)

    def _square_crop(self, size: Size, at: float | None) -> Tiled:
        """Return a square crop of the image, whose shorter side is resized to the side of the crop.

        Args:
            size: Size of the image.
            at: Position of the crop along the longer side, from 0 to below 1; None for the middle.

        Source: the image processor of CLIP in transformers.
        """
        side, (height, width) = self._size, size
        content = (int(side * height / width), side) if width < height else (side, int(side * width / height))
        if content[0] * content[1] > self.config.max_image_pixels:
            raise too_many_pixels(content[1], content[0], self.config.max_image_pixels)
        canvas = Canvas(content, content)
        excess = (content[0] - side, content[1] - side)
        top, left = (each // 2 if at is None else int(at * (each + 1)) for each in excess)
        return Tiled((canvas,), (Tile(0, top, left, None),))

    def _whole(self, size: Size) -> Canvas:
        """Return the canvas of the whole image."""
        config, (height, width), multiple = self.config, size, self.spec.size_multiple
        if isinstance(config, NativeTransform):
            if max(height, width) > config.max_aspect * min(height, width):
                raise SampleError(
                    f"an image of {width}x{height} pixels, the largest aspect is {config.max_aspect:g} (max_aspect)",
                    kind=FaultKind.DECODE,
                )
            area = area_size(height, width, multiple, config.min_pixels, config.max_pixels)
            return Canvas(area, area)
        if isinstance(config, LongestSideTransform):
            longest = longest_side_size(height, width, multiple, config.longest)
            return Canvas(longest, longest)
        if isinstance(config, PaddedTransform):
            content = shrunk_size(height, width, (config.max_height, config.max_width))
            return Canvas(content, (round_up(content[0], multiple), round_up(content[1], multiple)), fill=_FUYU_FILL)
        if isinstance(config, ScaledTransform):
            return ScaledCrop(config.longer, config.shorter, multiple).canvas(size)
        side = self._size
        if isinstance(config, FixedTransform) and config.keep_aspect and height != width:
            return on_square(size, side, min(config.min_side, side), config.background)
        return Canvas((side, side), (side, side))


@dataclass(frozen=True)
class DecodeTask:
    """A planned image that is not decoded yet.

    Attributes:
        transform: The transform that planned it.
        data: The encoded image.
        header: Format and size from its header.
        plan: Its plan.
        crops: Its crops, with uninitialised values until ``decode`` has run.
    """

    transform: ImageTransform
    data: bytes
    header: ImageSize
    plan: ImagePlan
    crops: tuple[MediaItem, ...]

    def decode(self) -> None:
        """Decode the image and write the values of its crops. Call it once, from any thread.

        Raises:
            SampleError: the image cannot be decoded, or does not have the size in its header.
        """
        config, header, plan = self.transform.config, self.header, self.plan
        pixels = decode_image(
            self.data,
            mode=config.decode,
            max_pixels=config.max_image_pixels,
            min_side=plan.needed_size if config.decode is DecodeMode.FAST else None,
            header=header,
            scratch=self.transform.scratch,
        )
        if pixels.shape[:2] != plan.size and config.decode is not DecodeMode.FAST:
            height, width = pixels.shape[:2]
            raise SampleError(
                f"its header says {header.width}x{header.height} pixels, the decoder returned {width}x{height}",
                kind=FaultKind.DECODE,
            )
        values = [crop.values for crop in self.crops]
        render(pixels, plan, self.transform.spec.patch_size, config.interpolation, values)
