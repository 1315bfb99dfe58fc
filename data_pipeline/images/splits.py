"""Aria's images: crops whose longer side has one length, of the whole image and of its parts.

    size --plan--> canvas of the whole image --cut--> parts --scaled_size--> crops, padded to whole patches

Each part is scaled like a whole image. A part that already has the length is not resampled. Its two published rules
differ, as pure functions of the image's size:

    nearest_aspect   grid of the nearest aspect, stretched; whole image first     the authors' code
    most_pixels      grid that keeps most of the image's pixels, aspect kept      transformers

``tilings`` has the rules with tiles of one size, for towers with a fixed grid.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from data_pipeline.errors import DataConfigError
from data_pipeline.images.crops import Canvas
from data_pipeline.images.native_sizes import Size, round_up
from data_pipeline.images.tilings import Tile, Tiled, Tiles
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import MediaSpec, Placement

_BLACK = 0
_RATIOS = ((1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (2, 4), (2, 3), (2, 2))
ARIA_GRIDS = (*_RATIOS, (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 1), (6, 1), (7, 1), (8, 1))
"""Grids (rows, columns) of Aria, in the order in which equally good ones are tried."""
Side = Annotated[int, Field(ge=1, le=64)]
Grids = Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1)]


def scaled_size(size: Size, longer: int, shorter: int) -> Size:
    """Scale the longer side to ``longer``, and the other one with it, but to at least ``shorter``.

    Source: Aria's image processor (aria/model/vision_processor.py), with 490 or 980, and 336. The shorter side is
    rounded down.
    """
    height, width = size
    scale = longer / max(height, width)
    if width >= height:
        return max(int(height * scale), shorter), longer
    return longer, max(int(width * scale), shorter)


class ScaledCrop:
    """Size of a crop: the longer side, the least shorter side, and the multiple that both are padded to, in pixels."""

    def __init__(self, longer: int, shorter: int, multiple: int) -> None:
        self.longer, self.shorter, self.multiple = longer, shorter, multiple

    def canvas(self, size: Size, source: tuple[int, tuple[int, int]] | None = None) -> Canvas:
        """Return the canvas of an image of ``size``, or of the part of this size at ``source``, as in ``Canvas``."""
        content = scaled_size(size, self.longer, self.shorter)
        padded = (round_up(content[0], self.multiple), round_up(content[1], self.multiple))
        return Canvas(content, padded, fill=_BLACK, source=None if source is None else (source[0], (*source[1], *size)))


def nearest_aspect_grid(size: Size, side: int, grids: Grids) -> Tiles:
    """Return the grid whose aspect (width / height) is nearest to the image's.

    Among equal ones, a later grid is used if the square of the image's height is more than half of its pixels, as in
    the source. Source: ``_select_best_resolution`` of Aria's image processor.
    """
    height, width = size
    best, best_gap = (1, 1), math.inf
    for rows, columns in grids:
        gap = abs(width / height - columns / rows)
        if gap < best_gap or (gap == best_gap and height * height > 0.5 * side * side * rows * columns):
            best, best_gap = (rows, columns), gap
    return best


def most_pixels_grid(size: Size, side: int, grids: Grids) -> Tiles:
    """Return the grid on which the image, with its aspect, keeps most of its pixels; then the one with least padding.

    Source: ``select_best_resolution`` in transformers, which LLaVA-NeXT introduced.
    """
    height, width = size

    def score(grid: Tiles) -> tuple[int, int]:
        rows, columns = grid[0] * side, grid[1] * side
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - rows * columns

    return max(grids, key=score)


class _Split(StrictConfig):
    has_overview: ClassVar[bool]

    if TYPE_CHECKING:

        @property
        def kind(self) -> str: ...

    def check(self, spec: MediaSpec) -> None:
        """Raise ``DataConfigError`` if the model needs a crop of the whole image, or only one crop."""
        placement = spec.placement
        if placement is Placement.PAIR or (placement is Placement.HYBRID and not self.has_overview):
            raise DataConfigError(
                f"transforms.split.kind={self.kind}: the model ({placement.value}) needs a crop of the whole image; "
                f"use {'no split' if placement is Placement.PAIR else 'nearest_aspect'}"
            )


class NearestAspectSplit(_Split):
    """The image stretched to the grid of squares with the nearest aspect, after the whole image (Aria's own code).

    A grid of one square gives the whole image alone.
    """

    kind: Literal["nearest_aspect"]
    grids: Grids = ARIA_GRIDS
    """Grids [rows, columns] of squares with the crop's length as their side. Aria's are 1 x 2 to 8 x 1."""

    has_overview: ClassVar[bool] = True

    def plan(self, size: Size, crop: ScaledCrop) -> Tiled:
        """Return canvases and tiles of an image of ``size``."""
        side = crop.longer
        rows, columns = nearest_aspect_grid(size, side, self.grids)
        whole = crop.canvas(size)
        if (rows, columns) == (1, 1):
            return Tiled((whole,), (Tile(0, 0, 0, None),))
        stretched = (rows * side, columns * side)
        cells = [(row, column) for row in range(rows) for column in range(columns)]
        parts = [crop.canvas((side, side), (0, (row * side, column * side))) for row, column in cells]
        tiles = [Tile(number + 2, 0, 0, cell) for number, cell in enumerate(cells)]
        return Tiled((Canvas(stretched, stretched), whole, *parts), (Tile(1, 0, 0, None), *tiles))


class MostPixelsSplit(_Split):
    """The image centred on a black canvas, which is cut into crops of at most the crop's length (transformers).

    There is no crop of the whole image. Crops at the right and the bottom may be smaller and are enlarged.
    """

    kind: Literal["most_pixels"]
    grids: Grids = ARIA_GRIDS
    """Grids [rows, columns] of cells that a canvas may have. Aria's are 1 x 2 to 8 x 1."""
    cell: int = Field(default=490, ge=1)
    """Side of a cell in pixels; a crop may cover several."""

    has_overview: ClassVar[bool] = False

    def plan(self, size: Size, crop: ScaledCrop) -> Tiled:
        """Return canvases and tiles of an image of ``size``."""
        rows, columns = most_pixels_grid(size, self.cell, self.grids)
        canvas = (rows * self.cell, columns * self.cell)
        content = self._content(size, canvas)
        at = ((canvas[0] - content[0]) // 2, (canvas[1] - content[1]) // 2)
        tops, lefts = (range(0, side, crop.longer) for side in canvas)
        parts, tiles = [], []
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                part = (min(crop.longer, canvas[0] - top), min(crop.longer, canvas[1] - left))
                parts.append(crop.canvas(part, (0, (top, left))))
                tiles.append(Tile(len(parts), 0, 0, (row, column)))
        return Tiled((Canvas(content, canvas, at, _BLACK), *parts), tuple(tiles))

    @staticmethod
    def _content(size: Size, canvas: Size) -> Size:
        """Return the size of the image on its canvas, with the aspect kept.

        Source: ``get_patch_output_size`` in transformers.
        """
        height, width = size
        across, down = canvas[1] / width, canvas[0] / height
        if across < down:
            return min(math.ceil(height * across), canvas[0]), canvas[1]
        return canvas[0], min(math.ceil(width * down), canvas[1])


SplitConfig = Annotated[NearestAspectSplit | MostPixelsSplit, Field(discriminator="kind")]
