"""Embeddings of a tile's position in its image: gated tables with a row for each tile of each grid of tiles.

``tile_row`` returns the row of a table for a tile of a grid.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.sizes import MAX_TILES

_NO_GRID = 1
"""Number of reserved grids at the beginning of a table. The reference code has one for absent images."""


@lru_cache
def tile_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return all grids (rows, columns) of at most ``max_tiles`` tiles, sorted by rows, then by columns.

    The tables have their rows in this order.

    Raises:
        ValueError: ``max_tiles`` is above ``MAX_TILES``.
    """
    if max_tiles > MAX_TILES:
        raise ValueError(f"max_tiles={max_tiles}: must be at most {MAX_TILES}")
    sides = range(1, max_tiles + 1)
    return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles)


def tile_row(grid: tuple[int, int], tile: int, max_tiles: int) -> int:
    """Return the table row of a tile.

    Args:
        grid: Rows and columns of the image's tiles.
        tile: 0-based index of the tile in its image, in row-major order. Its range is not checked.
        max_tiles: Most tiles of an image.

    Raises:
        ValueError: the grid has more tiles than ``max_tiles``.
    """
    grids = tile_grids(max_tiles)
    if grid not in grids:
        raise ValueError(f"an image of {grid[0]}x{grid[1]} tiles; the tower takes at most {max_tiles}")
    return (grids.index(grid) + _NO_GRID) * max_tiles + tile


def num_grids(max_tiles: int) -> int:
    """Return the number of grids in a table, the reserved one included."""
    return len(tile_grids(max_tiles)) + _NO_GRID


class TileEmbedding(nn.Module):
    """Adds a learned vector of the tile, times ``tanh(gate)``, to each row of the tile.

    Args:
        max_tiles: Most tiles of an image.
        dim: D.
        gate_init: Initial value of the gate.

    Source: Llama 3 (arXiv 2407.21783, section 7) and the reference code of Llama 3.2 Vision.
    """

    def __init__(self, max_tiles: int, dim: int, gate_init: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(num_grids(max_tiles), max_tiles, dim))
        self.gate = nn.Parameter(torch.full((1,), gate_init))
        self.constant_init = {"gate": gate_init}

    def forward(self, hidden: Float[Tensor, "rows D"], tiles: Int[Tensor, " rows"]) -> Float[Tensor, "rows D"]:
        """Return ``hidden`` with the vectors added; ``tiles`` are the table rows from ``tile_row``, one per row."""
        return hidden + F.embedding(tiles, self.embedding.flatten(0, 1)) * self.gate.tanh()


class TilePositions(nn.Module):
    """Adds ``(1 - g) * position_embedding + g * tile_embedding`` with ``g = tanh(gate)``.

    ``position_embedding`` depends on the position in the tile, ``tile_embedding`` also on the tile and its grid.

    Args:
        grid: Patches (rows, columns) of every tile.
        dim: D.
        class_token: Whether to put a class token first in every tile; its row is the first of both tables.
        max_tiles: Most tiles of an image.
        gate_init: Initial value of the gate.

    Source: as ``TileEmbedding``.
    """

    def __init__(self, grid: tuple[int, int], dim: int, class_token: bool, max_tiles: int, gate_init: float) -> None:
        super().__init__()
        self.grid = grid
        self.num_patches = grid[0] * grid[1]
        rows = self.num_patches + class_token
        self.position_embedding = nn.Parameter(torch.zeros(rows, dim))
        self.tile_embedding = nn.Parameter(torch.zeros(num_grids(max_tiles), max_tiles, rows, dim))
        self.gate = nn.Parameter(torch.full((1,), gate_init))
        self.constant_init = {"gate": gate_init}
        if class_token:
            self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.class_token = class_token

    def forward(self, patches: Float[Tensor, "P D"], tiles: Int[Tensor, " tiles"]) -> Float[Tensor, "P_with_class D"]:
        """Return the rows of all tiles, class tokens included.

        Args:
            patches: Packed tiles of ``num_patches`` rows each.
            tiles: Table row of each tile, from ``tile_row``.
        """
        crops = patches.view(-1, self.num_patches, patches.shape[-1])
        if self.class_token:
            crops = torch.cat([self.class_embedding.expand(crops.shape[0], 1, -1), crops], dim=1)
        gate = self.gate.tanh()
        crops = crops + (1 - gate) * self.position_embedding
        return (crops + gate * self.tile_embedding.flatten(0, 1).index_select(0, tiles)).flatten(0, 1)
