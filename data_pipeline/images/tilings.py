"""Published rules for splitting an image into tiles, as pure functions of its size.

    size --grid--> rows x columns --plan--> canvases (resized renderings) and the tiles cut from them, in reading order

    internvl   grid of nearest aspect, stretched; overview last         InternVL 1.5; NVLM with max_tiles 6
    llama      grid that enlarges least, aspect kept; no overview       Llama 3.2 Vision
    molmo      the same rule, crops overlap; overview first             Molmo
    mm1_5      grid that pads least, aspect kept; overview last         MM1.5
    idefics3   longer side of a fixed length, stretched; overview last  Idefics3, SmolVLM

``transforms`` decides which tiles are embedded and which attended; ``crops`` renders the pixels.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.document import ContentArea, Region
from data_pipeline.errors import DataConfigError
from data_pipeline.images.crops import Canvas, Crop
from data_pipeline.images.native_sizes import Size, fitted, longest_edge_size, whole_tiles_size
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec

Tiles = tuple[int, int]
"""Rows and columns of tiles."""

_BLACK = 0
"""Background of the canvases of Llama, Molmo and MM1.5. The MM1.5 paper does not state it."""
MaxTiles = Annotated[int, Field(ge=1, le=256)]


@dataclass(frozen=True)
class Tile:
    """A square part of a canvas.

    Attributes:
        canvas: Index into ``Tiled.canvases``.
        top, left: Its corner on the canvas, in pixels.
        cell: Row and column of the tile in the tiling; None for the overview.
        kept_region: As in ``MediaItem``.
    """

    canvas: int
    top: int
    left: int
    cell: Tiles | None
    kept_region: Region | None = None


@dataclass(frozen=True)
class Tiled:
    """A split image: its canvases, and its tiles in reading order. The overview, if there is one, is first or last."""

    canvases: tuple[Canvas, ...]
    tiles: tuple[Tile, ...]

    @property
    def grid(self) -> Tiles:
        """Rows and columns of the tiling; (1, 1) if there is only an overview."""
        rows, columns = zip(*(tile.cell or (0, 0) for tile in self.tiles), strict=True)
        return max(rows) + 1, max(columns) + 1


@functools.lru_cache
def grids(min_tiles: int, max_tiles: int) -> tuple[Tiles, ...]:
    """Return all grids with ``min_tiles`` to ``max_tiles`` tiles, sorted by number of tiles, then by rows."""
    found = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1) if r * c >= min_tiles]
    return tuple(sorted(found, key=lambda grid: (grid[0] * grid[1], grid[0])))


def internvl_grid(size: Size, side: int, min_tiles: int = 1, max_tiles: int = 12) -> Tiles:
    """Return the grid whose aspect (width / height) is nearest to the image's.

    Between equally near grids, the larger one is used if the image has more than half of its pixels.
    Source: InternVL 1.5 (arXiv 2404.16821), section 3.2, dynamic aspect ratio matching, and its code.
    """
    height, width = size
    best, best_gap = (1, 1), math.inf
    for rows, columns in grids(min_tiles, max_tiles):
        gap = abs(width / height - columns / rows)
        larger = gap == best_gap and height * width > 0.5 * side * side * rows * columns
        if gap < best_gap or larger:
            best, best_gap = (rows, columns), gap
    return best


def covering_grid(size: Size, side: int, max_tiles: int, real: type[np.floating[Any]] = np.float64) -> Tiles:
    """Return the grid that the image fills with the least enlargement, else with the least reduction; aspect kept.

    Scales are compared in the float type ``real``. Among equal scales, the grid with the fewest tiles is used. An image
    with a negative side gets one tile, and an image side of 0 fits any grid. Molmo produces such sides, because its
    ``size`` and ``side`` exclude the margins.

    Source: Llama 3.2 Vision (arXiv 2407.21783, section 7.1) and its code; Molmo (arXiv 2409.17146, section 2) and its
    code.
    """
    height, width = size
    if min(size) < 0:
        return 1, 1
    choices = np.array(grids(1, max_tiles))
    with np.errstate(divide="ignore"):
        scales = ((choices * side).astype(real) / np.array([height, width], real)).min(axis=1)
    enlarging = np.where(scales >= 1, scales, np.inf)
    chosen = enlarging.argmin() if (scales >= 1).any() else scales.argmax()
    rows, columns = choices[chosen].tolist()
    return rows, columns


def llama_content(size: Size, canvas: Size, side: int) -> Size:
    """Return the size of an image on its canvas. The aspect is kept; an image is enlarged to one tile at most.

    Source: ``get_image_size_fit_to_canvas`` of Llama 3.2 Vision in transformers.
    """
    height, width = size
    most = (min(max(height, side), canvas[0]), min(max(width, side), canvas[1]))
    down, across = most[0] / height, most[1] / width
    if across < down:
        return min(math.floor(height * across) or 1, most[0]), most[1]
    return most[0], min(math.floor(width * down) or 1, most[1])


def mm1_5_grid(size: Size, side: int, min_tiles: int = 4, max_tiles: int = 9) -> Tiles:
    """Return the grid with the least padding among those that are at least as large as the image.

    The padding is that of the image enlarged to the grid. If no grid is large enough, the one that reduces the image
    least is used. Among equal grids, the one with the fewest tiles is used.

    Source: MM1.5 (arXiv 2409.20566), section 3.1, dynamic image splitting.
    """
    height, width = size
    choices = grids(min_tiles, max_tiles)
    covering = [grid for grid in choices if height <= grid[0] * side and width <= grid[1] * side]
    if covering:
        return min(covering, key=lambda grid: _padding(size, grid, side))
    return max(choices, key=lambda grid: min(grid[0] * side / height, grid[1] * side / width))


def _padding(size: Size, grid: Tiles, side: int) -> int:
    """Return the pixels of a grid that the image, enlarged to fit, leaves empty."""
    height, width = fitted(size, (grid[0] * side, grid[1] * side))
    return grid[0] * grid[1] * side * side - height * width


class _Tiling(StrictConfig, ABC):
    has_overview: ClassVar[bool] = True
    allows_leftover_pixels: ClassVar[bool] = False
    """Whether a tile may have pixels beyond its last whole patch, which the tower does not read."""

    def check(self, side: int, spec: MediaSpec) -> None:
        """Raise ``DataConfigError`` if the tiling cannot use tiles of ``side`` pixels with this model."""

    @abstractmethod
    def grids(self, side: int) -> tuple[Tiles, ...]:
        """Return all grids that an image may have, with tiles of ``side`` pixels."""

    def with_reported_padding(self, crops: tuple[Crop, ...]) -> tuple[Crop, ...]:
        """Return the crops with the ``content_area`` that the model receives; by default each crop's own."""
        return crops


class _LimitedTiling(_Tiling):
    min_tiles: int = Field(default=1, ge=1)
    """Smallest number of tiles of an image, without the overview; at least 1."""
    max_tiles: MaxTiles = 12
    """Largest number of tiles of an image, without the overview; 1 to 256."""

    def grids(self, side: int) -> tuple[Tiles, ...]:
        return grids(self.min_tiles, self.max_tiles)

    @model_validator(mode="after")
    def _check_order(self) -> _LimitedTiling:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles={self.min_tiles} is above max_tiles={self.max_tiles}")
        return self


class InternvlTiling(_LimitedTiling):
    """The grid of the nearest aspect, to which the image is stretched, then an overview. One tile has no overview.

    Source: InternVL 1.5 (arXiv 2404.16821), section 3.2; NVLM (arXiv 2409.11402), section 4.1, with 6 tiles.
    """

    kind: Literal["internvl"] = "internvl"

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Return canvases and tiles of an image of ``size``; ``side`` is the side of a tile in pixels."""
        grid = internvl_grid(size, side, self.min_tiles, self.max_tiles)
        whole = Canvas((side, side), (side, side))
        if grid == (1, 1):
            return Tiled((whole,), (Tile(0, 0, 0, None),))
        stretched = (grid[0] * side, grid[1] * side)
        return Tiled((Canvas(stretched, stretched), whole), (*_adjacent(grid, side), Tile(1, 0, 0, None)))


class LlamaTiling(_Tiling):
    """The grid that enlarges the image least, with the image in its top left corner on black. No overview.

    Source: Llama 3.2 Vision (arXiv 2407.21783, section 7.1) and its image processor.
    """

    kind: Literal["llama"] = "llama"
    max_tiles: MaxTiles = 4
    """Largest number of tiles of an image; 1 to 256."""

    has_overview: ClassVar[bool] = False

    def grids(self, side: int) -> tuple[Tiles, ...]:
        return grids(1, self.max_tiles)

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Return canvases and tiles of an image of ``size``; ``side`` is the side of a tile in pixels."""
        grid = covering_grid(size, side, self.max_tiles)
        canvas = (grid[0] * side, grid[1] * side)
        return Tiled((Canvas(llama_content(size, canvas, side), canvas, fill=_BLACK),), _adjacent(grid, side))


class MolmoTiling(_Tiling):
    """An overview, then overlapping crops.

    In the overlap of two crops, each crop keeps the features of the half that is nearer to its centre. The aspect is
    kept, and the image is centred on black. Source: Molmo (arXiv 2409.17146), section 2 and its code.
    """

    kind: Literal["molmo"] = "molmo"
    max_tiles: MaxTiles = 12
    """Largest number of crops of an image, without the overview; 1 to 256."""
    margin: int = Field(default=4, ge=1)
    """Margin of a crop in patches. The features of a margin are kept only at the border of the image, where no
    neighbouring crop has them. At least 1, a multiple of the model's merge, and below half of a crop."""
    padding_of: Literal["crop", "next_crop"] = "crop"
    """Padding that a model with padding embeddings receives for a crop. ``crop``: its own. ``next_crop``: that of the
    next crop, as in the training of the published weights; all patches of the last crop then count as partly
    padded."""

    def grids(self, side: int) -> tuple[Tiles, ...]:
        return grids(1, self.max_tiles)

    def check(self, side: int, spec: MediaSpec) -> None:
        """Check the margin.

        Raises:
            DataConfigError: the margins cover the whole crop or split a merged feature, or the model pools each crop,
                so that no margin can be removed from its features.
        """
        if spec.pooled_side is not None or spec.query_sizes or spec.pooling is not None:
            raise DataConfigError(
                "transforms.tiling.kind=molmo: crops overlap, and the model pools each crop as a whole "
                "(projector.kind=c_abstractor, conv_pool, mean_pool or resampler); use another tiling"
            )
        patches = side // spec.patch_size
        if 2 * self.margin >= patches or self.margin % spec.merge:
            raise DataConfigError(
                f"transforms.tiling.margin={self.margin}: must be a multiple of the model's merge, {spec.merge}, and "
                f"below half of the {patches} patches of a crop"
            )

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Return canvases and tiles of an image of ``size``; ``side`` is the side of a tile in pixels."""
        margins = 2 * self.margin * spec.patch_size
        window = side - margins
        grid = covering_grid((size[0] - margins, size[1] - margins), window, self.max_tiles, np.float32)
        crops = tuple(
            Tile(1, row * window, column * window, (row, column), self._kept((row, column), grid, side, spec))
            for row in range(grid[0])
            for column in range(grid[1])
        )
        canvas = (grid[0] * window + margins, grid[1] * window + margins)
        canvases = (_centred_on(canvas, _molmo_content(size, canvas)) for canvas in ((side, side), canvas))
        return Tiled(tuple(canvases), (Tile(0, 0, 0, None), *crops))

    def with_reported_padding(self, crops: tuple[Crop, ...]) -> tuple[Crop, ...]:
        """Return the crops with their own content area, or with that of the next crop (``padding_of``).

        Source: Molmo's code, olmo/data/model_preprocessor.py, which appends the overview's mask but prepends the
        overview, so the masks are off by one.
        """
        if self.padding_of == "crop":
            return crops
        _, rows, columns = crops[-1].grid
        last = ContentArea(Region(0, 0, rows, columns), Region(0, 0, 0, 0))
        reported = [*(crop.content_area for crop in crops[1:]), last]
        return tuple(replace(crop, content_area=area) for crop, area in zip(crops, reported, strict=True))

    def _kept(self, cell: Tiles, grid: Tiles, side: int, spec: MediaSpec) -> Region:
        """Return the features that the crop at ``cell`` keeps."""
        margin, whole = self.margin // spec.merge, side // spec.size_multiple
        # A crop keeps its margin only at the border of the image.
        first = [0 if at == 0 else margin for at in cell]
        stop = [whole if at == count - 1 else whole - margin for at, count in zip(cell, grid, strict=True)]
        return Region(first[0], first[1], stop[0] - first[0], stop[1] - first[1])


class Mm15Tiling(_LimitedTiling):
    """The grid with the least padding, with the image centred on black, then an overview. One tile has no overview.

    Source: MM1.5 (arXiv 2409.20566), section 3.1: 4 to 9 tiles in training, up to 16 in inference.
    """

    kind: Literal["mm1_5"] = "mm1_5"
    min_tiles: int = Field(default=4, ge=1)
    """Smallest number of tiles of an image, without the overview; at least 1."""
    max_tiles: MaxTiles = 9
    """Largest number of tiles of an image, without the overview; 1 to 256."""

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Return canvases and tiles of an image of ``size``; ``side`` is the side of a tile in pixels."""
        grid = mm1_5_grid(size, side, self.min_tiles, self.max_tiles)
        whole = _centred(size, (side, side))
        if grid == (1, 1):
            return Tiled((whole,), (Tile(0, 0, 0, None),))
        canvases = (_centred(size, (grid[0] * side, grid[1] * side)), whole)
        return Tiled(canvases, (*_adjacent(grid, side), Tile(1, 0, 0, None)))


class Idefics3Tiling(_Tiling):
    """Tiles of the image at a fixed length of its longer side, stretched to whole tiles, then an overview.

    The image is resized to ``longest_side`` with its aspect, then to whole tiles, and the overview is made of the
    result. An image of one tile has no overview. Source: Idefics3 (arXiv 2408.12637), section 2.2; SmolVLM
    (arXiv 2504.05299), section 2; and their image processor in transformers.
    """

    allows_leftover_pixels: ClassVar[bool] = True
    kind: Literal["idefics3"] = "idefics3"
    longest_side: int = Field(default=2048, ge=1)
    """Length of the longer side in pixels, to which smaller images are enlarged, too; at most 4096 are used. Published
    models have four tiles there."""
    split: bool = True
    """False makes one crop of the whole image."""

    def grids(self, side: int) -> tuple[Tiles, ...]:
        most = -(-longest_edge_size(1, 1, self.longest_side)[0] // side) if self.split else 1
        return tuple((rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1))

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Return canvases and tiles of an image of ``size``; ``side`` is the side of a tile in pixels."""
        first = longest_edge_size(*size, self.longest_side)
        stretched = whole_tiles_size(*first, side)
        if not self.split or stretched == (side, side):
            return Tiled((Canvas((side, side), (side, side), via=(first,)),), (Tile(0, 0, 0, None),))
        whole = Canvas((side, side), (side, side), via=(first, stretched))
        tiles = _adjacent((stretched[0] // side, stretched[1] // side), side)
        return Tiled((Canvas(stretched, stretched, via=(first,)), whole), (*tiles, Tile(1, 0, 0, None)))


Tiling = InternvlTiling | LlamaTiling | MolmoTiling | Mm15Tiling | Idefics3Tiling
TilingConfig = Annotated[Tiling, Field(discriminator="kind")]


def single_tile(tiling: Tiling) -> Tiling:
    """Return the same tiling with at most one tile."""
    if isinstance(tiling, Idefics3Tiling):
        return tiling.model_copy(update={"split": False})
    limits: dict[str, int] = {name: 1 for name in ("min_tiles", "max_tiles") if name in type(tiling).model_fields}
    return tiling.model_copy(update=limits)


def _adjacent(grid: Tiles, side: int) -> tuple[Tile, ...]:
    """Return the tiles of canvas 0, row by row."""
    return tuple(
        Tile(0, row * side, column * side, (row, column)) for row in range(grid[0]) for column in range(grid[1])
    )


def _molmo_content(size: Size, canvas: Size) -> Size:
    """Return the largest size of the image's aspect within the canvas.

    It is computed in float32, as in the source, so a side is sometimes one pixel smaller than the exact result.

    Source: Molmo's code, olmo/data/model_preprocessor.py.
    """
    real = np.array(size, np.float32)
    height, width = (real * (np.array(canvas, np.float32) / real).min()).astype(int).tolist()
    return max(1, height), max(1, width)


def _centred(size: Size, canvas: Size) -> Canvas:
    return _centred_on(canvas, fitted(size, canvas))


def _centred_on(canvas: Size, content: Size) -> Canvas:
    return Canvas(content, canvas, ((canvas[0] - content[0]) // 2, (canvas[1] - content[1]) // 2), _BLACK)
