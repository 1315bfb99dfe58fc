"""The C-Abstractor: convolutions over the grid of each crop, pooled to a fixed square of features halfway.

    rows (P, C0) --blocks--> rows (P, C) --mean of rectangles--> rows (N side^2, C) --blocks, MLP--> (N side^2, D)

Rows of all crops stay packed. Most operations of a block treat each row separately. Only the 3 x 3 convolution, the
squeeze-and-excite and the pooling depend on grids, and process all crops with the same grid at once. Each module runs
once per forward pass for any number of grids, because sharded ranks must gather its weights together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.models.connectors.projector import ProjectorBase
from mmscale.nn.flops import Work
from mmscale.nn.host import to_device
from mmscale.nn.patch_embed import LearnedPositions
from mmscale.nn.rope import LearnedPositionsConfig
from mmscale.nn.sizes import Layers, ShrunkTo, Side, Width

Planes = Sequence[tuple[int, int, int]]
"""For each distinct grid, in the order of the packed rows: (number of crops, rows, columns)."""
SQUEEZE = 4
"""Input channels of a block per channel of its squeeze-and-excite bottleneck."""


class CAbstractorConfig(ProjectorBase):
    """Convolutions over the grid of a crop, with pooling to a fixed square halfway (Honeybee, MM1, MM1.5)."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    side: Annotated[Side, ShrunkTo(3)] = 12
    """Each crop becomes ``side * side`` features."""
    hidden_dim: Width
    """Channels of the convolutions."""
    depth: Layers = 3
    """Number of blocks before the pooling, and number of blocks after it."""
    positions: LearnedPositionsConfig | None = None
    """Learned vectors added to the tower's features at each grid position. ``grid`` must be that of the tower. Null for
    none."""

    @property
    def merge(self) -> int:
        """1: grids may have sides of any length."""
        return 1

    @property
    def learns_first(self) -> bool:
        return self.positions is not None

    @property
    def pooled_side(self) -> int:
        return self.side

    def check(self, fixed_grid: tuple[int, int] | None) -> None:
        if self.positions is None or self.positions.grid == fixed_grid:
            return
        crops = "crops of any size" if fixed_grid is None else f"crops of {list(fixed_grid)}"
        raise ValueError(
            f"connector.projector.positions.grid={list(self.positions.grid)}: the tower takes {crops}; give its grid, "
            "or null for no positions"
        )

    def build(self, feature_dim: int, dim: int) -> CAbstractor:
        return CAbstractor(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        inner, features = self.hidden_dim, self.side**2
        square = 2 * inner * inner
        blocks = square + 18 * inner  # The last product and the convolution of each block.
        squeezes = round(feature_dim / SQUEEZE) + (2 * self.depth - 1) * round(inner / SQUEEZE)
        shortcut = 1 if feature_dim == inner else 2  # Both read the tower's rows.
        after_pooling = self.depth * features * (blocks + square)
        return [
            Work("feature_patches", 2 * shortcut * feature_dim * inner),
            Work("feature_patches", self.depth * blocks + (self.depth - 1) * square),
            Work("frames", after_pooling + 4 * inner * squeezes + 2 * features * (inner + dim) * dim),
        ]


def by_grid(grids: Sequence[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], np.ndarray | None]:
    """Group the crops (for videos, the frames) by grid, in the order in which the grids first occur.

    Returns:
        The number of crops of each grid (``Planes``), and the indices of the crops group by group. The indices are None
        if the crops are in this order already.
    """
    sides = [(height, width) for time, height, width in grids for _ in range(time)]
    kinds = list(dict.fromkeys(sides))
    order = np.argsort([kinds.index(side) for side in sides], kind="stable")
    planes = [(sides.count(kind), *kind) for kind in kinds]
    return planes, None if (np.diff(order) > 0).all() else order


def rows_of(crops: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the packed row indices, int64, of ``crops`` in this order; crop i has ``lengths[i]`` rows."""
    starts = np.cumsum(lengths) - lengths
    return np.concatenate([np.arange(starts[crop], starts[crop] + lengths[crop]) for crop in crops])


def _split(rows: Tensor, planes: Planes) -> Iterator[tuple[Tensor, tuple[int, int, int]]]:
    """Yield the rows of each grid as ``(n, h * w, C)``, with the grid's entry of ``planes``."""
    for part, plane in zip(rows.split([n * h * w for n, h, w in planes]), planes, strict=True):
        yield part.unflatten(0, (plane[0], plane[1] * plane[2])), plane


def _image(part: Tensor, plane: tuple[int, int, int]) -> Float[Tensor, "n C h w"]:
    return part.unflatten(1, plane[1:]).permute(0, 3, 1, 2)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class DepthwiseConv(nn.Module):
    """A depthwise 3 x 3 convolution with zero padding and without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 9))  # Flat, because init.py uses the last dimension as fan-in.

    def forward(self, rows: Float[Tensor, "P C"], planes: Planes) -> Float[Tensor, "P C"]:
        weight = self.weight.view(-1, 1, 3, 3)
        images = [
            F.conv2d(_image(part, plane), weight, padding=1, groups=weight.shape[0])
            for part, plane in _split(rows, planes)
        ]
        return _joined([image.permute(0, 2, 3, 1).flatten(0, 2) for image in images])


class SqueezeExcite(nn.Module):
    """Scales the channels of a crop by gates computed from the mean over the crop.

    Source: Hu et al. 2018, "Squeeze-and-excitation networks", section 3.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, rows: Float[Tensor, "P C"], planes: Planes) -> Float[Tensor, "P C"]:
        parts = list(_split(rows, planes))
        means = _joined([part.mean(1) for part, _ in parts])
        gates = self.fc2(F.silu(self.fc1(means))).sigmoid()
        own = gates.split([n for n, _, _ in planes])
        return _joined([(part * gate.unsqueeze(1)).flatten(0, 1) for (part, _), gate in zip(parts, own, strict=True)])


class RegNetBlock(nn.Module):
    """1 x 1 convolution, depthwise 3 x 3, squeeze-and-excite, 1 x 1 convolution, and a shortcut around them.

    Source: Radosavovic et al. 2020, "Designing network design spaces", section 3.2, with groups of one channel, layer
    norms and SiLU, as in Honeybee.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Linear(in_channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels)
        self.conv2 = DepthwiseConv(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.se = SqueezeExcite(channels, round(in_channels / SQUEEZE))
        self.conv3 = nn.Linear(channels, channels, bias=False)
        self.norm3 = nn.LayerNorm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Linear(in_channels, channels, bias=False), nn.LayerNorm(channels))

    def forward(self, rows: Float[Tensor, "P C0"], planes: Planes) -> Float[Tensor, "P C"]:
        branch = F.silu(self.norm1(self.conv1(rows)))
        branch = F.silu(self.norm2(self.conv2(branch, planes)))
        branch = self.norm3(self.conv3(self.se(branch, planes)))
        return F.silu(branch + self.shortcut(rows))


class CAbstractor(nn.Module):
    """Maps a crop of any grid to ``side * side`` features.

    Source: Honeybee (arXiv 2312.06742), section 3.2, and its code, honeybee/projectors/projectors.py; MM1 (arXiv
    2403.09611) and MM1.5 (arXiv 2409.20566) use it with 144 features.
    """

    def __init__(self, feature_dim: int, dim: int, config: CAbstractorConfig) -> None:
        super().__init__()
        self.side = config.side
        self.positions = (
            None if config.positions is None else LearnedPositions(config.positions.grid, feature_dim, False)
        )
        inputs = [feature_dim] + [config.hidden_dim] * (config.depth - 1)
        self.before = nn.ModuleList(RegNetBlock(channels, config.hidden_dim) for channels in inputs)
        self.behind = nn.ModuleList(RegNetBlock(config.hidden_dim, config.hidden_dim) for _ in range(config.depth))
        self.fc1 = nn.Linear(config.hidden_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(
        self, features: Float[Tensor, "P feature_dim"], grids: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "F_rows D"]:
        """Return ``side * side`` rows of each frame, item after item."""
        planes, order = by_grid(grids)
        rows = features if self.positions is None else self.positions(features)
        if order is not None:
            lengths = np.concatenate([np.full(time, height * width) for time, height, width in grids])
            rows = rows.index_select(0, to_device(rows_of(order, lengths), rows.device))
        for block in self.before:
            rows = block(rows, planes)
        rows = self._pooled(rows, planes)
        squares = [(sum(n for n, _, _ in planes), self.side, self.side)]
        for block in self.behind:
            rows = block(rows, squares)
        rows = self.fc2(F.silu(self.fc1(rows)))
        if order is not None:
            inverse = to_device(np.argsort(order), rows.device)
            rows = rows.unflatten(0, (-1, self.side**2)).index_select(0, inverse).flatten(0, 1)
        return rows

    def _pooled(self, rows: Tensor, planes: Planes) -> Tensor:
        """Return the rows after adaptive average pooling of each crop to ``side * side``."""
        images = [F.adaptive_avg_pool2d(_image(part, plane), self.side) for part, plane in _split(rows, planes)]
        return _joined([image.permute(0, 2, 3, 1).flatten(0, 2) for image in images])
