"""From tower features to decoder width, with fewer and wider rows on the way if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.models.connector_config import LinearProjectorConfig, MlpProjectorConfig
from mmscale.nn.mlp import ACTIVATIONS
from mmscale.nn.norms import NormConfig, NormKind, build_norm


def merge_order(grids: Sequence[tuple[int, int, int]], merge: int) -> np.ndarray:
    """Packed patch numbers, reordered so that each square of ``merge x merge`` patches is consecutive.

    Squares stay in row-major order, and so do the patches of a square: int64 ``(P,)``.
    """
    pieces = []
    start = 0
    for time, height, width in grids:
        numbers = np.arange(start, start + time * height * width)
        squares = numbers.reshape(time, height // merge, merge, width // merge, merge)
        pieces.append(squares.transpose(0, 1, 3, 2, 4).reshape(-1))
        start += time * height * width
    return np.concatenate(pieces)


class Projector(nn.Module):
    """Pixel shuffle, norm, one or two linear layers.

    Source: LLaVA (linear, MLP); NVLM (arXiv 2409.11402) and InternVL for pixel shuffle; Qwen2-VL's merger.
    """

    def __init__(self, feature_dim: int, dim: int, config: LinearProjectorConfig | MlpProjectorConfig) -> None:
        super().__init__()
        self.config = config
        merged = feature_dim * config.merge**2
        if config.norm != "none":
            kind = NormConfig(kind=NormKind.LAYER, eps=config.norm_eps)
            self.norm = build_norm(kind, feature_dim if config.norm == "before_merge" else merged)
        if isinstance(config, MlpProjectorConfig):
            hidden = config.hidden_dim or dim
            self.fc1 = nn.Linear(merged, hidden, bias=config.bias)
            self.activate = ACTIVATIONS[config.activation]
            self.fc2 = nn.Linear(hidden, dim, bias=config.bias)
        else:
            self.linear = nn.Linear(merged, dim, bias=config.bias)

    def forward(
        self, features: Float[Tensor, "P feature_dim"], grids: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "F_rows D"]:
        """``P / merge**2`` rows, item after item."""
        if self.config.norm == "before_merge":
            features = self.norm(features)
        if self.config.merge > 1:
            order = torch.from_numpy(merge_order(grids, self.config.merge)).to(features.device)
            features = features.index_select(0, order).view(-1, features.shape[1] * self.config.merge**2)
        if self.config.norm == "after_merge":
            features = self.norm(features)
        if isinstance(self.config, MlpProjectorConfig):
            return self.fc2(self.activate(self.fc1(features)))
        return self.linear(features)
