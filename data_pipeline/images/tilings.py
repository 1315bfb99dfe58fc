"""How an image is cut into tiles: the published rules as pure functions of its size, and the choice among them.

    size --grid--> rows x columns --plan--> canvases (resized renderings) and the tiles cut from them, in reading order

    internvl   grid of nearest aspect, stretched; overview last         InternVL 1.5; NVLM with max_tiles 6
    llama      grid that enlarges least, aspect kept; no overview       Llama 3.2 Vision
    molmo      the same rule, crops overlap; overview first             Molmo
    mm1_5      grid that pads least, aspect kept; overview last         MM1.5

Not for: which tiles are embedded and which attended (``transforms``), pixels (``crops``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.document import Coverage, Region
from data_pipeline.errors import DataConfigError
from data_pipeline.images.crops import Canvas, View
from data_pipeline.images.native_sizes import Size, fitted
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec

Tiles = tuple[int, int]
"""Rows and columns of tiles."""

_BLACK = 0
"""Fill of Llama's, Molmo's and (for want of a published value) MM1.5's canvases."""
MaxTiles = Annotated[int, Field(ge=1, le=256)]


@dataclass(frozen=True)
class Tile:
    """A square of a canvas; ``place`` is its row and column among the tiles, None for the overview."""

    canvas: int
    top: int
    left: int
    place: Tiles | None
    kept: Region | None = None


@dataclass(frozen=True)
class Tiled:
    """An image cut up: canvases, and tiles in reading order, the overview first or last if there is one."""

    canvases: tuple[Canvas, ...]
    tiles: tuple[Tile, ...]

    @property
    def grid(self) -> Tiles:
        """Rows and columns of the tiles; (1, 1) without any."""
        rows, columns = zip(*(tile.place or (0, 0) for tile in self.tiles), strict=True)
        return max(rows) + 1, max(columns) + 1


@functools.lru_cache
def grids(min_tiles: int, max_tiles: int) -> tuple[Tiles, ...]:
    """All grids of so many tiles, fewest tiles first, of equally many the one with fewer rows."""
    found = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1) if r * c >= min_tiles]
    return tuple(sorted(found, key=lambda grid: (grid[0] * grid[1], grid[0])))


def internvl_grid(size: Size, side: int, min_tiles: int = 1, max_tiles: int = 12) -> Tiles:
    """The grid whose width over height is nearest to the image's.

    Of equally near grids the larger one, if the image has more pixels than half of it.
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
    """The grid that the image fills with the least enlargement, else with the least reduction; aspect kept.

    Of grids that are equally good in the number format ``real`` that with the fewest tiles. Source: Llama 3.2 Vision
    (arXiv 2407.21783, section 7.1) and its code; Molmo (arXiv 2409.17146, section 2) and its code, whose ``size`` and
    ``side`` leave the margins out. There a size can be zero or less: it asks for one tile.
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
    """What an image becomes on its canvas: never enlarged beyond one tile, never larger than the canvas.

    Source: ``get_image_size_fit_to_canvas`` of Llama 3.2 Vision in transformers.
    """
    height, width = size
    most = (min(max(height, side), canvas[0]), min(max(width, side), canvas[1]))
    down, across = most[0] / height, most[1] / width
    if across < down:
        return min(math.floor(height * across) or 1, most[0]), most[1]
    return most[0], min(math.floor(width * down) or 1, most[1])


def mm1_5_grid(size: Size, side: int, min_tiles: int = 4, max_tiles: int = 9) -> Tiles:
    """Of the grids that hold the image at its own size, the one that the enlarged image pads least; if none does, the
    one that reduces it least. Of equals that with the fewest tiles.

    Source: MM1.5 (arXiv 2409.20566), section 3.1, dynamic image splitting.
    """
    height, width = size
    choices = grids(min_tiles, max_tiles)
    covering = [grid for grid in choices if height <= grid[0] * side and width <= grid[1] * side]
    if covering:
        return min(covering, key=lambda grid: _padding(size, grid, side))
    return max(choices, key=lambda grid: min(grid[0] * side / height, grid[1] * side / width))


def _padding(size: Size, grid: Tiles, side: int) -> int:
    height, width = fitted(size, (grid[0] * side, grid[1] * side))
    return grid[0] * grid[1] * side * side - height * width


class _Tiling(StrictConfig):
    has_overview: ClassVar[bool] = True

    def check(self, side: int, spec: MediaSpec) -> None:
        """Refuses what does not fit tiles of ``side`` pixels; most tilings fit any.

        Raises:
            DataConfigError: the message says what does not fit.
        """

    def padded(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """The views with the padding that the model is told of, mostly their own."""
        return views


class _LimitedTiling(_Tiling):
    min_tiles: int = Field(default=1, ge=1)
    """Tiles at least, without the overview."""
    max_tiles: MaxTiles = 12
    """Tiles at most, without the overview."""

    @model_validator(mode="after")
    def _check_order(self) -> _LimitedTiling:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles={self.min_tiles} is above max_tiles={self.max_tiles}")
        return self


class InternvlTiling(_LimitedTiling):
    """The grid of nearest aspect, the image stretched to it, then an overview; of one tile, that tile alone.

    Source: InternVL 1.5 (arXiv 2404.16821), section 3.2; NVLM (arXiv 2409.11402), section 4.1, with 6 tiles.
    """

    kind: Literal["internvl"] = "internvl"

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Canvases and tiles of an image of ``size``."""
        grid = internvl_grid(size, side, self.min_tiles, self.max_tiles)
        whole = Canvas((side, side), (side, side))
        if grid == (1, 1):
            return Tiled((whole,), (Tile(0, 0, 0, None),))
        stretched = (grid[0] * side, grid[1] * side)
        return Tiled((Canvas(stretched, stretched), whole), (*_adjacent(grid, side), Tile(1, 0, 0, None)))


class LlamaTiling(_Tiling):
    """The grid that enlarges the image least, the image in its top left corner on black; no overview.

    Source: Llama 3.2 Vision (arXiv 2407.21783, section 7.1) and its image processor.
    """

    kind: Literal["llama"] = "llama"
    max_tiles: MaxTiles = 4
    """Tiles at most."""

    has_overview: ClassVar[bool] = False

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Canvases and tiles of an image of ``size``."""
        grid = covering_grid(size, side, self.max_tiles)
        canvas = (grid[0] * side, grid[1] * side)
        return Tiled((Canvas(llama_content(size, canvas, side), canvas, fill=_BLACK),), _adjacent(grid, side))


class MolmoTiling(_Tiling):
    """An overview, then overlapping crops; of what two crops see, each hands on the half that is nearer to it.

    Aspect is kept, the image centred on black. Source: Molmo (arXiv 2409.17146), section 2 and its code.
    """

    kind: Literal["molmo"] = "molmo"
    max_tiles: MaxTiles = 12
    """Crops at most, without the overview."""
    margin: int = Field(default=4, ge=1)
    """Patches on each side of a crop that are handed on only where no neighbour has them."""
    padding_of: Literal["view", "next_view"] = "view"
    """Whose padding a model with embeddings of padding is told of: the view's own, or, as the published weights were
    trained, that of the view behind it; of the last view then, that all patches show some."""

    def check(self, side: int, spec: MediaSpec) -> None:
        """Refuses margins that do not fit the crops.

        Raises:
            DataConfigError: they leave nothing of a crop, cut through a merged feature, or the model pools crops, whose
                features have no place then.
        """
        if spec.pooled_side is not None:
            raise DataConfigError(
                "transforms.tiling.kind=molmo: crops overlap, and the model pools each of them whole (projector.kind="
                "c_abstractor); take another tiling"
            )
        patches = side // spec.patch_size
        if 2 * self.margin >= patches or self.margin % spec.merge:
            raise DataConfigError(
                f"transforms.tiling.margin={self.margin}: must be a multiple of the model's merge, {spec.merge}, and "
                f"below half of the {patches} patches of a crop"
            )

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Canvases and tiles of an image of ``size``."""
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

    def padded(self, views: tuple[View, ...]) -> tuple[View, ...]:
        """Their own padding, or each that of the next.

        Source: Molmo's code, olmo/data/model_preprocessor.py, which puts the mask of the overview last and the overview
        first.
        """
        if self.padding_of == "view":
            return views
        _, rows, columns = views[-1].grid
        last = Coverage(Region(0, 0, rows, columns), Region(0, 0, 0, 0))
        told = [*(view.coverage for view in views[1:]), last]
        return tuple(replace(view, coverage=coverage) for view, coverage in zip(views, told, strict=True))

    def _kept(self, place: Tiles, grid: Tiles, side: int, spec: MediaSpec) -> Region:
        margin, whole = self.margin // spec.merge, side // spec.size_multiple
        # A crop keeps its margin only at the rim of the image.
        first = [0 if at == 0 else margin for at in place]
        stop = [whole if at == count - 1 else whole - margin for at, count in zip(place, grid, strict=True)]
        return Region(first[0], first[1], stop[0] - first[0], stop[1] - first[1])


class Mm15Tiling(_LimitedTiling):
    """The grid that the image pads least, the image centred on black, then an overview.

    Source: MM1.5 (arXiv 2409.20566), section 3.1: 4 to 9 tiles in training, up to 16 in inference.
    """

    kind: Literal["mm1_5"] = "mm1_5"
    min_tiles: int = Field(default=4, ge=1)
    """Tiles at least, without the overview."""
    max_tiles: MaxTiles = 9
    """Tiles at most, without the overview."""

    def plan(self, size: Size, side: int, spec: MediaSpec) -> Tiled:
        """Canvases and tiles of an image of ``size``."""
        grid = mm1_5_grid(size, side, self.min_tiles, self.max_tiles)
        whole = _centred(size, (side, side))
        if grid == (1, 1):
            return Tiled((whole,), (Tile(0, 0, 0, None),))
        canvases = (_centred(size, (grid[0] * side, grid[1] * side)), whole)
        return Tiled(canvases, (*_adjacent(grid, side), Tile(1, 0, 0, None)))


Tiling = InternvlTiling | LlamaTiling | MolmoTiling | Mm15Tiling
TilingConfig = Annotated[Tiling, Field(discriminator="kind")]


def single_tile(tiling: Tiling) -> Tiling:
    """The same rule with one tile at most."""
    limits: dict[str, int] = {name: 1 for name in ("min_tiles", "max_tiles") if name in type(tiling).model_fields}
    return tiling.model_copy(update=limits)


def _adjacent(grid: Tiles, side: int) -> tuple[Tile, ...]:
    """Tiles of canvas 0, row by row."""
    return tuple(
        Tile(0, row * side, column * side, (row, column)) for row in range(grid[0]) for column in range(grid[1])
    )


def _molmo_content(size: Size, canvas: Size) -> Size:
    """The image's largest size of its aspect within the canvas, in single precision, which rarely takes a pixel off.

    Source: Molmo's code, olmo/data/model_preprocessor.py.
    """
    real = np.array(size, np.float32)
    height, width = (real * (np.array(canvas, np.float32) / real).min()).astype(int).tolist()
    return max(1, height), max(1, width)


def _centred(size: Size, canvas: Size) -> Canvas:
    return _centred_on(canvas, fitted(size, canvas))


def _centred_on(canvas: Size, content: Size) -> Canvas:
    return Canvas(content, canvas, ((canvas[0] - content[0]) // 2, (canvas[1] - content[1]) // 2), _BLACK)
