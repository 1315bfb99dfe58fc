"""What a tower tells tiles of their place in an image: gated tables with a row for each grid and each of its tiles.

Tables are looked up by a number of grid and tile together: ``tile_row``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.nn.sizes import MOST_TILES

_NO_GRID = 1
"""Rows at the beginning of a table that belong to no grid: the reference code keeps one for images that are absent."""


@lru_cache
def tile_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Grids (rows, columns) of at most so many tiles, in the order of a table's rows: by rows, then by columns.

    Raises:
        ValueError: ``max_tiles`` is above ``MOST_TILES``.
    """
    if max_tiles > MOST_TILES:
        raise ValueError(f"max_tiles={max_tiles}: must be at most {MOST_TILES}")
    sides = range(1, max_tiles + 1)
    return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= max_tiles)


def tile_row(grid: tuple[int, int], tile: int, max_tiles: int) -> int:
    """Number of a tile, counted row by row, among all tiles of all grids.

    Raises:
        ValueError: the grid has more tiles than ``max_tiles``.
    """
    grids = tile_grids(max_tiles)
    if grid not in grids:
        raise ValueError(f"an image of {grid[0]}x{grid[1]} tiles; the tower knows at most {max_tiles}")
    return (grids.index(grid) + _NO_GRID) * max_tiles + tile


def num_grids(max_tiles: int) -> int:
    """Rows of a table."""
    return len(tile_grids(max_tiles)) + _NO_GRID


class TileEmbedding(nn.Module):
    """Adds ``tanh(gate)`` times a vector of the tile to each of its rows.

    Args:
        max_tiles: Tiles of an image at most.
        dim: D.
        gate_init: Start of the gate.

    Source: Llama 3 (arXiv 2407.21783, section 7.1) and the reference code of Llama 3.2 Vision.
    """

    def __init__(self, max_tiles: int, dim: int, gate_init: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(num_grids(max_tiles), max_tiles, dim))
        self.gate = nn.Parameter(torch.full((1,), gate_init))
        self.constant_init = {"gate": gate_init}

    def forward(self, hidden: Float[Tensor, "rows D"], tiles: Int[Tensor, " rows"]) -> Float[Tensor, "rows D"]:
        """``tiles`` are numbers of ``tile_row``."""
        return hidden + F.embedding(tiles, self.embedding.flatten(0, 1)) * self.gate.tanh()


class TilePositions(nn.Module):
    """Places in a tile, and places in a tile of a grid: as one gate opens, the second take over from the first.

    Args:
        grid: Patches (rows, columns) of every tile.
        dim: D.
        class_token: Whether there is one, first in every tile; its row of the tables is the first.
        max_tiles: Tiles of an image at most.
        gate_init: Start of the gate.

    Source: as ``TileEmbedding``.
    """

    def __init__(self, grid: tuple[int, int], dim: int, class_token: bool, max_tiles: int, gate_init: float) -> None:
        super().__init__()
        self.grid = grid
        self.places = grid[0] * grid[1]
        self.position_embedding = nn.Parameter(torch.zeros(self.places + class_token, dim))
        self.tile_embedding = nn.Parameter(torch.zeros(num_grids(max_tiles), max_tiles, self.places + class_token, dim))
        self.gate = nn.Parameter(torch.full((1,), gate_init))
        self.constant_init = {"gate": gate_init}
        if class_token:
            self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.class_token = class_token

    def forward(self, patches: Float[Tensor, "P D"], tiles: Int[Tensor, " tiles"]) -> Float[Tensor, "P_with_class D"]:
        """Packed tiles of ``places`` patches each; ``tiles`` are their numbers of ``tile_row``."""
        views = patches.view(-1, self.places, patches.shape[-1])
        if self.class_token:
            views = torch.cat([self.class_embedding.expand(views.shape[0], 1, -1), views], dim=1)
        gate = self.gate.tanh()
        views = views + (1 - gate) * self.position_embedding
        return (views + gate * self.tile_embedding.flatten(0, 1).index_select(0, tiles)).flatten(0, 1)
