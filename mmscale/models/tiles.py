"""Which rows a tower has that sees all tiles of an image together, and which of them see which.

    [rows of the tiles that there are, image after image] [image 0: absent tiles, fillers] [image 1: ...] ...

The published towers compute every image as if it had the most tiles, with black ones in the place of those that it has
not, and fill the rows of each tile up to a multiple of 8. Their masks then hide these rows from each other only: real
rows attend real rows, absent tiles and fillers; absent tiles and fillers attend real rows. Weights that were trained so
need it so. ``attend_absent=False`` leaves all of that out.

Source: the reference code of Llama 3.2 Vision, as in transformers' ``modeling_mllama.py``,
``_prepare_aspect_ratio_attention_mask``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from data_pipeline.batch import AttentionSegments, BranchedSegments, Segments, ViewPlace
from data_pipeline.io.strict import StrictConfig
from mmscale.nn.sizes import MOST_TILES, ShrunkTo
from mmscale.nn.tile_embed import tile_row

_MULTIPLE = 8
"""Rows of a tile are filled up to a multiple of this."""


class TilesConfig(StrictConfig):
    """The tiles of an image know their places in it and see each other.

    Source: Llama 3 (arXiv 2407.21783, section 7.1) and the reference code of Llama 3.2 Vision.
    """

    max_tiles: int = Field(default=4, ge=1, le=MOST_TILES)
    """Tiles of an image at most: tables have a row for each grid of so many."""
    global_layers: Annotated[int, ShrunkTo(2)] = Field(default=8, ge=0, le=1 << 12)
    """Gated blocks behind ``post_norm`` and a second embedding of tiles; ``last_output`` is theirs."""
    attend_absent: bool = True
    """Compute absent tiles and rows that fill up each tile, and let every patch attend them, as the published weights
    were trained: an image costs ``max_tiles`` tiles. False: real patches alone, which computes something else."""
    gate_init: float = 0.0
    """Start of the gates of embeddings of tiles; 0 as published: without effect at first."""
    global_gate_init: float = math.pi / 4
    """Start of the gates in the global blocks."""


def tiles_of_images(places: Sequence[ViewPlace]) -> list[tuple[tuple[int, int], int]]:
    """Grid of tiles and number of views of each image of a batch, in order."""
    images = (list(views) for _, views in groupby(places, key=lambda place: place.image))
    return [(views[0].tiles, len(views)) for views in images]


@dataclass(frozen=True)
class TileRows:
    """The stream of a tower; all on the host.

    Attributes:
        tiles: int64 ``(tiles,)`` number of each tile in the tables: of those that there are, then of the absent ones.
        num_absent: How many of them are absent.
        order: int64 ``(rows,)`` which row of all tiles, tile after tile, stands at each place of the stream; one behind
            the last for a filler. None where they stand so already.
        row_tiles: int64 ``(rows,)`` number in the tables of the tile that each place of the stream belongs to.
        attended: What each row of the stream sees.
        num_real: Rows of tiles that there are: the first of the stream.
        absent: int64 places of the stream that hold rows of absent tiles.
    """

    tiles: npt.NDArray[np.int64]
    num_absent: int
    order: npt.NDArray[np.int64] | None
    row_tiles: npt.NDArray[np.int64]
    attended: AttentionSegments
    num_real: int
    absent: npt.NDArray[np.int64]

    @classmethod
    def of(cls, places: Sequence[ViewPlace], rows: int, max_tiles: int, attend_absent: bool) -> TileRows:
        """The stream of a batch.

        Args:
            places: Of its views.
            rows: Of a tile, class token included.
            max_tiles: Tiles of an image at most.
            attend_absent: Whether absent tiles and fillers are computed.

        Raises:
            ValueError: an image has more tiles, or a view of its whole beside them.
        """
        images = tiles_of_images(places)
        for grid, count in images:
            if count != grid[0] * grid[1]:
                raise ValueError(f"{count} views of an image of {grid[0]}x{grid[1]} tiles: the tower takes tiles alone")
        there = [tile_row(grid, tile, max_tiles) for grid, count in images for tile in range(count)]
        lengths = [count * rows for _, count in images]
        if not attend_absent:
            tiles = np.array(there, dtype=np.int64)
            none = np.empty(0, dtype=np.int64)
            return cls(tiles, 0, None, np.repeat(tiles, rows), Segments.from_lengths(lengths), sum(lengths), none)
        return cls._with_absent(images, np.array(there, dtype=np.int64), rows, max_tiles)

    @classmethod
    def _with_absent(
        cls, images: list[tuple[tuple[int, int], int]], there: npt.NDArray[np.int64], rows: int, max_tiles: int
    ) -> TileRows:
        absent = [tile_row(grid, tile, max_tiles) for grid, count in images for tile in range(count, max_tiles)]
        tiles = np.concatenate([there, np.array(absent, dtype=np.int64)])
        fill, filler = -rows % _MULTIPLE, len(tiles) * rows
        order, row_tiles, absent_places = [np.arange(len(there) * rows)], [np.repeat(there, rows)], []
        pieces: list[tuple[int, int]] = []  # Rows of each image that are real, and that are not.
        first = place = len(there) * rows
        for grid, count in images:
            lacking = (max_tiles - count) * rows
            all_tiles = [tile_row(grid, tile, max_tiles) for tile in range(max_tiles)]
            order += [np.arange(first, first + lacking), np.full(max_tiles * fill, filler)]
            row_tiles += [np.repeat(all_tiles[count:], rows), np.repeat(all_tiles, fill)]
            absent_places.append(np.arange(place, place + lacking))
            pieces.append((count * rows, lacking + max_tiles * fill))
            first += lacking
            place += lacking + max_tiles * fill
        return cls(
            tiles,
            len(absent),
            np.concatenate(order),
            np.concatenate(row_tiles).astype(np.int64),
            _attended(pieces),
            len(there) * rows,
            np.concatenate(absent_places),
        )


def on_device(attended: AttentionSegments, device: torch.device) -> AttentionSegments:
    """The same with its tensors there."""
    if isinstance(attended, Segments):
        return Segments(attended.cu.to(device), attended.bounds)
    queries, keys = (Segments(each.cu.to(device), each.bounds) for each in (attended.queries, attended.keys))
    return BranchedSegments(queries, keys, attended.rows.to(device))


def _attended(pieces: list[tuple[int, int]]) -> BranchedSegments:
    """Real rows of an image see all of its rows, the others its real ones."""
    real_starts = np.cumsum([0, *(real for real, _ in pieces)])
    other_starts = np.cumsum([real_starts[-1], *(others for _, others in pieces)])
    keys, lengths = [], []
    for image, (real, others) in enumerate(pieces):
        keys += [np.arange(real) + real_starts[image], np.arange(others) + other_starts[image]]
        lengths.append(real + others)
    for image, (real, _) in enumerate(pieces):
        keys.append(np.arange(real) + real_starts[image])
        lengths.append(real)
    queries = [real for real, _ in pieces] + [others for _, others in pieces]
    rows = torch.from_numpy(np.concatenate(keys).astype(np.int64))
    return BranchedSegments(Segments.from_lengths(queries), Segments.from_lengths(lengths), rows)
