"""Row order and attention mask of a tower that attends across the tiles of an image.

    [rows of existing tiles, image after image] [image 0: absent tiles, fillers] [image 1: ...] ...

The published towers compute every image with ``max_tiles`` tiles. The normalised pixels of absent tiles are 0, and
filler rows pad each tile to a multiple of 8 rows. Absent tiles and fillers are masked only from each other: real rows
attend to all rows of their image, and absent tiles and fillers attend to the real rows. Published weights need these
rows. ``attend_absent=False`` computes only the existing tiles.

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

from data_pipeline.batch import AttentionSegments, BranchedSegments, CropLocation, Segments
from data_pipeline.io.strict import StrictConfig
from mmscale.nn.host import to_device
from mmscale.nn.sizes import MAX_TILES, ShrunkTo
from mmscale.nn.tile_embed import tile_row

_MULTIPLE = 8
"""Filler rows pad each tile to a multiple of this."""


class TilesConfig(StrictConfig):
    """Attention between the tiles of an image, with embeddings of each tile's position in the image.

    Source: Llama 3 (arXiv 2407.21783, section 7) and the reference code of Llama 3.2 Vision.
    """

    max_tiles: int = Field(default=4, ge=1, le=MAX_TILES)
    """Most tiles of an image. The embedding tables have a row for each grid of up to this many tiles."""
    global_layers: Annotated[int, ShrunkTo(2, counts_blocks=True)] = Field(default=8, ge=0, le=1 << 12)
    """Number of gated blocks after ``post_norm`` and a second tile embedding. The features contain the output of these
    blocks in place of the output of ``post_norm``."""
    attend_absent: bool = True
    """Compute absent tiles and filler rows and let every patch attend to them, as when the published weights were
    trained. Every image then costs as much as ``max_tiles`` tiles. False: compute only the existing tiles, which gives
    other results."""
    gate_init: float = 0.0
    """Initial value of the gates of the tile embeddings; 0 (as published): no effect at first."""
    global_gate_init: float = math.pi / 4
    """Initial value of the gates in the global blocks."""


def tiles_of_images(locations: Sequence[CropLocation]) -> list[tuple[tuple[int, int], int]]:
    """Return the grid of tiles and the number of crops of each image of a batch, in order."""
    images = (list(crops) for _, crops in groupby(locations, key=lambda location: location.image))
    return [(crops[0].tiles, len(crops)) for crops in images]


@dataclass(frozen=True)
class TileRows:
    """The row sequence that a tower's blocks process for a batch, in the order shown above; all on the host.

    Attributes:
        tiles: int64 ``(tiles,)``, table row (``tile_row``) of each tile: existing tiles, then absent ones.
        num_absent: Number of absent tiles.
        order: int64 ``(rows,)``, for each row of the sequence its index in the concatenated rows of ``tiles``. For a
            filler it is the number of those rows. None if the order is unchanged.
        row_tiles: int64 ``(rows,)``, table row of the tile that each row of the sequence belongs to.
        attended: Rows that each row of the sequence attends to.
        num_real: Number of rows of existing tiles, which come first in the sequence.
        absent: int64, indices in the sequence of the rows of absent tiles.
    """

    tiles: npt.NDArray[np.int64]
    num_absent: int
    order: npt.NDArray[np.int64] | None
    row_tiles: npt.NDArray[np.int64]
    attended: AttentionSegments
    num_real: int
    absent: npt.NDArray[np.int64]

    @classmethod
    def from_locations(
        cls, locations: Sequence[CropLocation], rows: int, max_tiles: int, attend_absent: bool
    ) -> TileRows:
        """Return the row sequence of a batch.

        Args:
            locations: Image and tile of each crop, in the order of the batch.
            rows: Rows of a tile, class token included.
            max_tiles: Most tiles of an image.
            attend_absent: Whether to compute absent tiles and fillers.

        Raises:
            ValueError: an image has more than ``max_tiles`` tiles, or an overview crop in addition to its tiles.
        """
        images = tiles_of_images(locations)
        for grid, count in images:
            if count != grid[0] * grid[1]:
                raise ValueError(
                    f"{count} crops of an image of {grid[0]}x{grid[1]} tiles: the tower takes only tiles, no overview"
                )
        existing = [tile_row(grid, tile, max_tiles) for grid, count in images for tile in range(count)]
        lengths = [count * rows for _, count in images]
        if not attend_absent:
            tiles = np.array(existing, dtype=np.int64)
            none = np.empty(0, dtype=np.int64)
            return cls(tiles, 0, None, np.repeat(tiles, rows), Segments.from_lengths(lengths), sum(lengths), none)
        return cls._with_absent(images, np.array(existing, dtype=np.int64), rows, max_tiles)

    @classmethod
    def _with_absent(
        cls, images: list[tuple[tuple[int, int], int]], existing: npt.NDArray[np.int64], rows: int, max_tiles: int
    ) -> TileRows:
        absent = [tile_row(grid, tile, max_tiles) for grid, count in images for tile in range(count, max_tiles)]
        tiles = np.concatenate([existing, np.array(absent, dtype=np.int64)])
        fill, filler = -rows % _MULTIPLE, len(tiles) * rows
        order, row_tiles, absent_indices = [np.arange(len(existing) * rows)], [np.repeat(existing, rows)], []
        row_counts: list[tuple[int, int]] = []  # Per image: real rows, and rows of absent tiles and fillers.
        source = position = len(existing) * rows  # Next row of an absent tile, and its index in the sequence.
        for grid, count in images:
            num_absent = (max_tiles - count) * rows
            all_tiles = [tile_row(grid, tile, max_tiles) for tile in range(max_tiles)]
            order += [np.arange(source, source + num_absent), np.full(max_tiles * fill, filler)]
            row_tiles += [np.repeat(all_tiles[count:], rows), np.repeat(all_tiles, fill)]
            absent_indices.append(np.arange(position, position + num_absent))
            row_counts.append((count * rows, num_absent + max_tiles * fill))
            source += num_absent
            position += num_absent + max_tiles * fill
        return cls(
            tiles,
            len(absent),
            np.concatenate(order),
            np.concatenate(row_tiles).astype(np.int64),
            _attended(row_counts),
            len(existing) * rows,
            np.concatenate(absent_indices),
        )


def on_device(attended: AttentionSegments, device: torch.device) -> AttentionSegments:
    """Return a copy with its tensors on ``device``."""
    if isinstance(attended, Segments):
        return Segments(to_device(attended.cu, device), attended.bounds)
    queries, keys = (Segments(to_device(each.cu, device), each.bounds) for each in (attended.queries, attended.keys))
    return BranchedSegments(queries, keys, to_device(attended.key_tokens, device))


def _attended(row_counts: list[tuple[int, int]]) -> BranchedSegments:
    """Return segments in which real rows attend to all rows of their image, and the other rows to its real rows.

    ``row_counts`` has the number of real and of other rows of each image.
    """
    real_starts = np.cumsum([0, *(real for real, _ in row_counts)])
    other_starts = np.cumsum([real_starts[-1], *(others for _, others in row_counts)])
    keys, lengths = [], []
    for image, (real, others) in enumerate(row_counts):
        keys += [np.arange(real) + real_starts[image], np.arange(others) + other_starts[image]]
        lengths.append(real + others)
    for image, (real, _) in enumerate(row_counts):
        keys.append(np.arange(real) + real_starts[image])
        lengths.append(real)
    queries = [real for real, _ in row_counts] + [others for _, others in row_counts]
    rows = torch.from_numpy(np.concatenate(keys).astype(np.int64))
    return BranchedSegments(Segments.from_lengths(queries), Segments.from_lengths(lengths), rows)
