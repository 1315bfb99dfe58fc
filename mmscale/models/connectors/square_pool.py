"""Projectors that pool squares of patches: the mean of each square, or a convolution, then two linear layers.

Unlike a pixel shuffle (``projector``), they take grids whose sides are no multiple of a square's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.media_spec import Grid, SquarePooling
from mmscale.models.connectors.projector import ProjectorBase
from mmscale.nn.block import ACTIVATIONS, Activation
from mmscale.nn.flops import Work
from mmscale.nn.host import to_device
from mmscale.nn.sizes import Width


class _SquarePool(ProjectorBase):
    side: int = Field(default=2, ge=1, le=16)
    """Side of the squares of patches, each of which becomes one feature; 1 to 16."""
    last_rows: Literal["drop", "pad"] = "drop"
    """What becomes of the rows of patches below the last whole square: ``drop`` them, as a convolution without padding
    does, or ``pad`` them to a square. A mean is over the patches that exist; a convolution reads zeros for the
    others."""
    last_columns: Literal["drop", "pad"] = "drop"
    """The same for the columns of patches to the right of the last whole square."""
    hidden_dim: Width | None = None
    """Channels between the linear layers; null: the decoder's width."""
    activation: Activation = Activation.GELU
    """Activation between the linear layers."""
    bias: bool = True
    """Biases on the convolution and the linear layers."""

    @property
    def merge(self) -> int:
        """1: grids may have sides of any length."""
        return 1

    @property
    def pooling(self) -> SquarePooling:
        return SquarePooling(self.side, self.last_rows == "pad", self.last_columns == "pad")

    def check(self, fixed_grid: tuple[int, int] | None) -> None:
        if fixed_grid is not None and min(self.pooling.features(*fixed_grid)) < 1:
            raise ValueError(
                f"connector.projector.side={self.side}: the tower's crops of {list(fixed_grid)} patches have no whole "
                "square; lower it, or set last_rows and last_columns to pad"
            )

    def _layers(self, pooled_dim: int, dim: int) -> list[Work]:
        hidden = self.hidden_dim or dim
        return [Work("features", 2 * pooled_dim * hidden), Work("features", 2 * hidden * dim)]


class MeanPoolConfig(_SquarePool):
    """The mean of each square of patches, then two linear layers."""

    kind: Literal["mean_pool"] = "mean_pool"

    def build(self, feature_dim: int, dim: int) -> SquarePool:
        return SquarePool(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        return self._layers(feature_dim, dim)


class ConvPoolConfig(_SquarePool):
    """A convolution whose stride is its kernel, then two linear layers."""

    kind: Literal["conv_pool"] = "conv_pool"
    conv_dim: Width | None = None
    """Channels after the convolution; null: those of the tower's features."""

    def build(self, feature_dim: int, dim: int) -> SquarePool:
        return SquarePool(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        pooled = self.conv_dim or feature_dim
        return [Work("features", 2 * feature_dim * self.side**2 * pooled), *self._layers(pooled, dim)]


def square_patches(
    grids: Sequence[Grid], pooling: SquarePooling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the packed patches of each square, and which of them exist.

    Args:
        grids: Grids of the items, whose patches are packed in row-major order.
        pooling: The squares, which are in row-major order, and so are the patches of each square.

    Returns:
        Indices of patches ``(F_rows, side**2)``, 0 for a patch outside of its grid; and False for those.
    """
    side, pieces, start = pooling.side, [np.empty((0, pooling.side**2), np.int64)], 0
    for time, height, width in grids:
        rows, columns = pooling.features(height, width)
        numbers = np.full((time, max(rows * side, height), max(columns * side, width)), -1)
        numbers[:, :height, :width] = np.arange(start, start + time * height * width).reshape(time, height, width)
        squares = numbers[:, : rows * side, : columns * side].reshape(time, rows, side, columns, side)
        pieces.append(squares.transpose(0, 1, 3, 2, 4).reshape(-1, side**2))
        start += time * height * width
    indices = np.concatenate(pieces)
    return np.maximum(indices, 0), indices >= 0


class SquarePool(nn.Module):
    """Mean or convolution over squares of patches, then two linear layers with an activation between them.

    Source: Baichuan-Omni (arXiv 2410.08565), which names both for its visual and its video projector.
    """

    def __init__(self, feature_dim: int, dim: int, config: MeanPoolConfig | ConvPoolConfig) -> None:
        super().__init__()
        self.config = config
        pooled, hidden = feature_dim, config.hidden_dim or dim
        if isinstance(config, ConvPoolConfig):
            pooled = config.conv_dim or feature_dim
            # The weight of a convolution, its inputs in the order (row, column, channel).
            self.conv = nn.Linear(config.side**2 * feature_dim, pooled, bias=config.bias)
        self.fc1 = nn.Linear(pooled, hidden, bias=config.bias)
        self.activate = ACTIVATIONS[config.activation]
        self.fc2 = nn.Linear(hidden, dim, bias=config.bias)

    def forward(self, features: Float[Tensor, "P feature_dim"], grids: Sequence[Grid]) -> Float[Tensor, "F_rows D"]:
        """Return one row for each square, item after item."""
        indices, exists = square_patches(grids, self.config.pooling)
        squares = features.index_select(0, to_device(indices.reshape(-1), features.device))
        squares = squares.view(*indices.shape, features.shape[1])
        if not exists.all():
            squares = squares.masked_fill(to_device(~exists, features.device).unsqueeze(-1), 0)
        if isinstance(self.config, ConvPoolConfig):
            pooled = self.conv(squares.flatten(1))
        elif exists.all():
            pooled = squares.mean(1)
        else:
            counts = to_device(exists.sum(1, dtype=np.float32)[:, None], features.device)
            pooled = (squares.sum(1, dtype=torch.float32) / counts).to(features.dtype)
        return self.fc2(self.activate(self.fc1(pooled)))
