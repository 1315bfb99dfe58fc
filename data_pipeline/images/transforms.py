"""Image to views: decode, augment, resize, cut into patches.

    fixed                            one view of a fixed size
    native, longest_side, padded     one view at the image's own aspect, in whole patches (``native_sizes``)
    tiles                            tiles of one size by a published rule, most with an overview (``tilings``)

Which views are embedded and which are attended follows from ``MediaSpec.placement``. Randomness comes from one
generator that the caller keys by sample, so a view is a pure function. Not for: text (``template``).
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
from data_pipeline.images.crops import AugmentConfig, Canvas, ImagePlan, View, coverage, render
from data_pipeline.images.decode import DecodeMode, Scratch, decode_image, too_many_pixels
from data_pipeline.images.image_tokens import ImageLayoutConfig
from data_pipeline.images.native_sizes import Size, area_size, lifted, longest_side_size, shrunk_size
from data_pipeline.images.tilings import InternvlTiling, Tile, Tiled, TilingConfig, single_tile
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec, Placement
from data_pipeline.order.randomness import Draws
from data_pipeline.shards.image_header import ImageSize, image_size

_BLACK = np.uint8(0)
_PLANS_KEPT = 1024
"""Most images come in few sizes."""


class _TransformConfig(StrictConfig):
    """What every transform has."""

    decode: DecodeMode = DecodeMode.EXACT
    """``exact`` decodes every pixel with torchvision; ``fast`` lets JPEGs be scaled while decoding."""
    interpolation: Literal["bicubic", "bilinear", "bilinear_float"] = "bicubic"
    """Resize filter, always antialiased. Bytes are resized with a rounding between widths and heights; with
    ``bilinear_float`` (Molmo) they are rounded once, behind both."""
    max_image_pixels: int = Field(default=1 << 26, ge=1)
    """Refuse larger stored images by their header (decompression bombs); pixels."""
    augment: AugmentConfig | None = None
    """Random changes in training; evaluation never applies them."""
    layout: ImageLayoutConfig | None = None
    """Tokens that stand around, between and before the features of an image; null for none."""


class FixedTransform(_TransformConfig):
    """One view of ``size x size`` pixels."""

    kind: Literal["fixed"] = "fixed"
    size: int | None = Field(default=None, ge=1)
    """Side, pixels; a multiple of patch size times merge. None takes the vision tower's fixed size."""
    keep_aspect: bool = False
    """Pad the shorter side with white instead of stretching the image to a square."""
    crop: Literal["center", "random"] | None = None
    """Takes a square of the image, its shorter side resized to ``size`` (CLIP): ``center`` the middle, ``random`` any
    in training and else the middle; null keeps the image whole."""

    @model_validator(mode="after")
    def _one_way(self) -> FixedTransform:
        if self.keep_aspect and self.crop is not None:
            raise ValueError("keep_aspect pads and crop cuts; set one of them")
        return self


class NativeTransform(_TransformConfig):
    """One view at the image's aspect, at native resolution where the limits on its area allow it.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, naive dynamic resolution.
    """

    kind: Literal["native"] = "native"
    min_pixels: int = Field(default=56 * 56, ge=1)
    """Smaller images are enlarged to at least this many pixels."""
    max_pixels: int = Field(default=1280 * 28 * 28, ge=1)
    """Larger images are reduced to at most this many pixels."""
    max_aspect: float = Field(default=200.0, ge=1)
    """Longer side over shorter side; beyond it a sample is refused."""


class LongestSideTransform(_TransformConfig):
    """One view at native resolution, its longer side within a limit; stretched a little to whole patches.

    Source: Pixtral (arXiv 2410.07073), section 2.
    """

    kind: Literal["longest_side"] = "longest_side"
    longest: int = Field(default=1024, ge=1)
    """Larger images are reduced until no side is longer; pixels, a multiple of patch size times merge."""


class PaddedTransform(_TransformConfig):
    """One view at native resolution within a frame, padded at the right and the bottom to whole patches.

    Source: Fuyu-8B's model card and its image processor.
    """

    kind: Literal["padded"] = "padded"
    max_height: int = Field(default=1080, ge=1)
    """Larger images are reduced until they fit; pixels, a multiple of patch size times merge."""
    max_width: int = Field(default=1920, ge=1)
    """The same for the other side."""


class TilesTransform(_TransformConfig):
    """Tiles of ``size x size`` pixels, by one of the published rules, most of them with an overview."""

    kind: Literal["tiles"] = "tiles"
    size: int | None = Field(default=None, ge=1)
    """Side of a tile, pixels. None takes the vision tower's fixed size."""
    tiling: TilingConfig = InternvlTiling()
    """The rule: ``internvl`` (NVLM too), ``llama``, ``molmo`` or ``mm1_5``."""
    split_up_to: int | None = Field(default=None, ge=1)
    """Images of a sample up to which they are split; with more of them each has one tile at most (MM1.5: 2). Null
    splits all."""


_NATIVE = (NativeTransform, LongestSideTransform, PaddedTransform)
_Native = NativeTransform | LongestSideTransform | PaddedTransform
TransformConfig = Annotated[
    FixedTransform | NativeTransform | LongestSideTransform | PaddedTransform | TilesTransform,
    Field(discriminator="kind"),
]
_Layout = tuple[tuple[Canvas, ...], tuple[View, ...]]
"""Canvases, and the views that are cut from them."""
_FUYU_FILL = 1  # Its processor pads with 1 before it divides by 255.


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
        self.scratch = Scratch()
        self._plain = functools.lru_cache(maxsize=_PLANS_KEPT)(self._plain_plan)
        self._size = 0
        self._stretched: _Layout | None = None  # The one layout of a transform that stretches every image to a square.
        if isinstance(config, _NATIVE):
            self._check_native(config)
            return
        self._size = self._fixed_size(config)
        if isinstance(config, FixedTransform) and config.crop is None and not config.keep_aspect:
            self._stretched = self._layout((self._size, self._size), 1)
        if isinstance(config, TilesTransform):
            config.tiling.check(self._size, spec)
            self._check_tiles(config, spec)
            if spec.placement is Placement.HYBRID and not config.tiling.has_overview:
                raise DataConfigError(
                    f"transforms.tiling.kind={config.tiling.kind}: has no overview, and the model (connector.kind="
                    "hybrid) writes overviews into token slots; take another tiling or connector"
                )

    @staticmethod
    def _check_tiles(config: TilesTransform, spec: MediaSpec) -> None:
        if spec.placement is Placement.PAIR:
            raise DataConfigError(
                "transforms.kind=tiles: the model (connector.kind=contrastive) compares one view of an image with its "
                "text; use fixed, or native where the tower takes any size"
            )
        if spec.max_tiles is None:
            return
        if config.tiling.has_overview:
            raise DataConfigError(
                f"transforms.tiling.kind={config.tiling.kind}: has an overview, but the vision tower (vision.tiles) "
                "knows tiles alone; use kind: llama"
            )
        if config.tiling.max_tiles > spec.max_tiles:
            raise DataConfigError(
                f"transforms.tiling.max_tiles={config.tiling.max_tiles}: the vision tower knows at most "
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
        sides = (
            {"longest": config.longest}
            if isinstance(config, LongestSideTransform)
            else {"max_height": config.max_height, "max_width": config.max_width}
        )
        for name, side in sides.items():
            if side % self.spec.size_multiple:
                raise DataConfigError(
                    f"transforms.{name}={side}: must be a multiple of patch size x merge = {self.spec.size_multiple}"
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
        if config.size % self.spec.size_multiple:
            raise DataConfigError(
                f"transforms.size={config.size}: must be a multiple of patch size x merge = {self.spec.size_multiple}"
            )
        if grid is not None and grid != (side, side):
            need = f"{grid[0] * self.spec.patch_size}x{grid[1] * self.spec.patch_size}"
            raise DataConfigError(f"transforms.size={config.size}: the vision tower takes {need} pixels")
        return config.size

    def __call__(
        self, data: bytes, rng: Draws | None = None, expected: Size | None = None, num_images: int = 1
    ) -> tuple[MediaItem, ...]:
        """Views of one encoded image, in reading order.

        Args:
            data: The encoded image.
            rng: Draws the augmentation; None applies none.
            expected: Height and width that the shard's index promised, if it did.
            num_images: Images of its sample, itself included.

        Raises:
            SampleError: the image cannot be decoded, is refused, or is not what the index says.
        """
        picture = self.outline(data, rng, expected, num_images)
        picture.draw()
        return picture.views

    def outline(
        self,
        data: bytes,
        rng: Draws | None = None,
        expected: Size | None = None,
        num_images: int = 1,
    ) -> Picture:
        """The views before they have pixels.

        Args:
            data, rng, expected, num_images: As for the views.

        Raises:
            SampleError: the image is refused by its header or is not what the index says.
        """
        header = image_size(data)
        size = (header.height, header.width)
        if expected is not None and expected != size:
            raise SampleError(
                f"an image of {size[1]}x{size[0]} pixels, the index says {expected[1]}x{expected[0]}: an older index? "
                "Build it again with: mmscale data index",
                kind=FaultKind.DECODE,
            )
        plan = self.plan(size, rng, num_images)
        return Picture(self, data, header, plan, self._items(plan, is_black=False))

    def measure(self, size: Size, rng: Draws | None = None, num_images: int = 1) -> tuple[MediaItem, ...]:
        """The views that an image of this size gives, with black pixels that take no memory.

        Draws from ``rng`` exactly as the image itself would.

        Args:
            size: Height and width as shown, as ``image_header.image_size`` and the shard's index give them.
            rng, num_images: As for the image.

        Raises:
            SampleError: the image is refused by its size.
        """
        if size[0] < 1 or size[1] < 1:
            raise SampleError("the index holds no size of this image: its header is damaged", kind=FaultKind.DECODE)
        return self._items(self.plan(size, rng, num_images), is_black=True)

    def _items(self, plan: ImagePlan, is_black: bool) -> tuple[MediaItem, ...]:
        """Views with values that are not written yet, or with black ones that take no memory."""
        items = []
        for view in plan.views:
            shape = (math.prod(view.grid), self.spec.patch_dim)
            values = np.broadcast_to(_BLACK, shape) if is_black else np.empty(shape, np.uint8)
            items.append(MediaItem(values, view.grid, view.embedded, view.kept, view.place, view.coverage, view.tiles))
        return tuple(items)

    def plan(self, size: Size, rng: Draws | None = None, num_images: int = 1) -> ImagePlan:
        """What becomes of an image of ``size`` in a sample of so many: a pure function of these and of the draws.

        Raises:
            SampleError: the image is refused by its size.
        """
        if size[0] * size[1] > self.config.max_image_pixels:
            raise too_many_pixels(size[1], size[0], self.config.max_image_pixels)
        augment = self.config.augment
        wanders = isinstance(self.config, FixedTransform) and self.config.crop == "random"
        if rng is None or (augment is None and not wanders):
            return self._plain(size, num_images)
        at = rng.random() if wanders else None
        if augment is None:
            return ImagePlan(size, *self._layout(size, num_images, at))
        box, flip, color = augment.draw(size, rng)
        return ImagePlan(size, *(self._stretched or self._layout(box[2:], num_images, at)), box, flip, color)

    def _plain_plan(self, size: Size, num_images: int) -> ImagePlan:
        return ImagePlan(size, *self._layout(size, num_images))

    def _layout(self, size: Size, num_images: int, at: float | None = None) -> _Layout:
        """Canvases and views of what is left after augmentation; ``at`` as for ``_square``."""
        config, placement = self.config, self.spec.placement
        if isinstance(config, TilesTransform):
            split = config.split_up_to is None or num_images <= config.split_up_to
            tiling = config.tiling if split else single_tile(config.tiling)
            tiled = tiling.plan(size, self._size, self.spec)
        elif isinstance(config, FixedTransform) and config.crop is not None:
            tiled = self._square(size, at)
        else:
            tiled = Tiled((self._whole(size),), (Tile(0, 0, 0, None),))
        tiles = tiled.tiles
        if placement is Placement.HYBRID and len(tiles) == 1:  # The one view is overview and tile.
            tiles = (tiles[0], replace(tiles[0], place=(0, 0)))
            roles = [True, False]
        else:
            roles = [
                placement is Placement.EMBEDDING or (placement is Placement.HYBRID and tile.place is None)
                for tile in tiles
            ]
        cut_up, views = tiled.grid, []
        for tile, embedded in zip(tiles, roles, strict=True):
            canvas, patch = tiled.canvases[tile.canvas], self.spec.patch_size
            height, width = canvas.size if isinstance(config, _NATIVE) else (self._size, self._size)
            rows, columns = height // patch, width // patch
            covered = coverage(canvas, tile.top, tile.left, rows, columns, patch) if self.spec.padding else None
            grid = (1, rows, columns)
            views.append(View(tile.canvas, tile.top, tile.left, grid, embedded, tile.kept, tile.place, covered, cut_up))
        if self.spec.padding and isinstance(config, TilesTransform):
            return tiled.canvases, config.tiling.padded(tuple(views))
        return tiled.canvases, tuple(views)

    def _square(self, size: Size, at: float | None) -> Tiled:
        """A square of the image, its shorter side resized to that of the view.

        Args:
            size: Of the image.
            at: Where along the longer side it lies, from 0 to below 1; None for the middle.

        Source: the image processor of CLIP in transformers.
        """
        side, (height, width) = self._size, size
        content = (int(side * height / width), side) if width < height else (side, int(side * width / height))
        if content[0] * content[1] > self.config.max_image_pixels:
            raise too_many_pixels(content[1], content[0], self.config.max_image_pixels)
        canvas = Canvas(content, content)
        spare = (content[0] - side, content[1] - side)
        top, left = (each // 2 if at is None else int(at * (each + 1)) for each in spare)
        return Tiled((canvas,), (Tile(0, top, left, None),))

    def _whole(self, size: Size) -> Canvas:
        """The canvas of the whole image."""
        config, (height, width), multiple = self.config, size, self.spec.size_multiple
        if isinstance(config, NativeTransform):
            if max(height, width) > config.max_aspect * min(height, width):
                raise SampleError(
                    f"an image of {width}x{height} pixels, the longest aspect taken is {config.max_aspect:g}",
                    kind=FaultKind.DECODE,
                )
            area = area_size(height, width, multiple, config.min_pixels, config.max_pixels)
            return Canvas(area, area)
        if isinstance(config, LongestSideTransform):
            longest = longest_side_size(height, width, multiple, config.longest)
            return Canvas(longest, longest)
        if isinstance(config, PaddedTransform):
            content = shrunk_size(height, width, (config.max_height, config.max_width))
            return Canvas(content, (lifted(content[0], multiple), lifted(content[1], multiple)), fill=_FUYU_FILL)
        side = self._size
        if isinstance(config, FixedTransform) and config.keep_aspect and height != width:
            longer = max(height, width)
            content = (max(1, round(height * side / longer)), max(1, round(width * side / longer)))
            return Canvas(content, (side, side), ((side - content[0]) // 2, (side - content[1]) // 2))
        return Canvas((side, side), (side, side))


@dataclass(frozen=True)
class Picture:
    """An image that is planned and not decoded.

    Attributes:
        transform: What planned it.
        data: The encoded image.
        header: Its header.
        plan: What becomes of it.
        views: Its views; ``draw`` writes their values.
    """

    transform: ImageTransform
    data: bytes
    header: ImageSize
    plan: ImagePlan
    views: tuple[MediaItem, ...]

    def draw(self) -> None:
        """Decodes the image and writes the values of its views. Any thread may call it, once.

        Raises:
            SampleError: the image cannot be decoded, or its pixels are not as many as its header says.
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
                f"its header says {header.width}x{header.height} pixels, the decoder gave {width}x{height}",
                kind=FaultKind.DECODE,
            )
        values = [view.values for view in self.views]
        render(pixels, plan, self.transform.spec.patch_size, config.interpolation, values)
