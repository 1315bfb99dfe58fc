"""Projectors from tower features to the decoder's width: the base class, and the kinds ``linear`` and ``mlp``.

A kind is a configuration class and a module in one file. ``models/projector_config.py`` lists the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import QuerySizes, Reductions, SquarePooling
from mmscale.nn.block import ACTIVATIONS, Activation, NormConfig, NormKind, build_norm
from mmscale.nn.flops import Work
from mmscale.nn.host import to_device
from mmscale.nn.sizes import Epsilon, Side, Width


class ProjectorBase(StrictConfig, ABC):
    """Base class of a projector's configuration.

    A subclass has a field ``kind``, and a field or property ``merge``: the side of the square of patches that becomes
    one feature. Its module maps ``(features (P, feature_dim), grids)`` to rows of the decoder's width.
    """

    if TYPE_CHECKING:  # At run time a declaration here would change the order of the subclasses' fields.

        @property
        def merge(self) -> int: ...

    @abstractmethod
    def build(self, feature_dim: int, dim: int) -> nn.Module:
        """Return the module from ``feature_dim`` channels of the tower to the decoder's width ``dim``."""

    @abstractmethod
    def work(self, feature_dim: int, dim: int) -> list[Work]:
        """Return the forward operations, in order: the first product with a weight reads the tower's features.

        The counts are ``feature_patches`` (rows of the tower), ``features`` (those divided by ``merge ** 2``),
        ``frames``, ``passes`` (1), and for attention ``pooled_pairs`` (query-key pairs within the squares). With
        ``query_sizes``, ``features`` counts the queries of all crops, and ``query_pairs`` their pairs of query and key.
        """

    @property
    def learns_first(self) -> bool:
        """Whether there are parameters before the first product, which then needs the gradient of its inputs."""
        return False

    @property
    def pooled_side(self) -> int | None:
        """Side of the square of features that each frame is pooled to; None: one feature per square of patches."""
        return None

    @property
    def query_sizes(self) -> QuerySizes:
        """Numbers of features of crops by their size, with learned queries; empty: the number follows from the grid."""
        return ()

    @property
    def pooling(self) -> SquarePooling | None:
        """The squares of patches that become one feature each, if grids may have sides of any length; else None."""
        return None

    @property
    def reductions(self) -> Reductions:
        """Convolutions and poolings of a sequence of rows, in modalities besides images; empty: one feature a row."""
        return ()

    @property
    def accepts_class_feature(self) -> bool:
        """Whether the tower may put the feature of a class token before those of the patches."""
        return False

    def check(self, fixed_grid: tuple[int, int] | None) -> None:
        """Raise ``ValueError`` if the projector does not fit a tower whose crops have this grid (None: any grid)."""

    def check_width(self, feature_dim: int) -> None:
        """Raise ``ValueError`` if the projector does not fit a tower with this many channels a feature."""


class _Merging(ProjectorBase):
    merge: Side = 1
    """Side of the square of patches that becomes one feature (pixel shuffle); 1 for no merging."""
    norm: Literal["none", "before_merge", "after_merge"] = "none"
    """Norm: ``before_merge`` over each patch (Qwen2-VL), ``after_merge`` over each merged feature (NVLM), or
    ``none``."""
    norm_kind: NormKind = NormKind.LAYER
    """Kind of that norm: ``layernorm``, or ``rmsnorm`` (Qwen2.5-VL)."""
    norm_eps: Epsilon = 1e-6
    """Epsilon of the norm: 1e-6 in Qwen2-VL, 1e-5 in NVLM."""
    bias: bool = True
    """Biases on the linear layers."""

    @property
    def learns_first(self) -> bool:
        return self.norm != "none"

    @property
    def accepts_class_feature(self) -> bool:
        return self.merge == 1


class LinearProjectorConfig(_Merging):
    """One linear layer."""

    kind: Literal["linear"] = "linear"

    def build(self, feature_dim: int, dim: int) -> Projector:
        return Projector(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        return [Work("features", 2 * feature_dim * self.merge**2 * dim)]


class MlpProjectorConfig(_Merging):
    """Two linear layers with an activation between them."""

    kind: Literal["mlp"] = "mlp"
    hidden_dim: Width | None = None
    """Channels between the layers; null: the decoder's width."""
    activation: Activation = Activation.GELU
    """Activation between the layers."""

    def build(self, feature_dim: int, dim: int) -> Projector:
        return Projector(feature_dim, dim, self)

    def work(self, feature_dim: int, dim: int) -> list[Work]:
        hidden = self.hidden_dim or dim
        return [Work("features", 2 * feature_dim * self.merge**2 * hidden), Work("features", 2 * hidden * dim)]


def merge_order(grids: Sequence[tuple[int, int, int]], merge: int) -> np.ndarray:
    """Return indices of the packed patches, int64 ``(P,)``, that make each square of ``merge x merge`` consecutive.

    Squares are in row-major order, and so are the patches of each square.
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
    """Pixel shuffle with an optional norm, then one or two linear layers.

    Source: LLaVA (linear, MLP); NVLM (arXiv 2409.11402) and InternVL (pixel shuffle); Qwen2-VL (its patch merger).
    """

    def __init__(self, feature_dim: int, dim: int, config: LinearProjectorConfig | MlpProjectorConfig) -> None:
        super().__init__()
        self.config = config
        merged = feature_dim * config.merge**2
        if config.norm != "none":
            kind = NormConfig(kind=config.norm_kind, eps=config.norm_eps)
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
        """Return ``P / merge**2`` rows, item after item."""
        if self.config.norm == "before_merge":
            features = self.norm(features)
        if self.config.merge > 1:
            order = to_device(merge_order(grids, self.config.merge), features.device)
            features = features.index_select(0, order).view(-1, features.shape[1] * self.config.merge**2)
        if self.config.norm == "after_merge":
            features = self.norm(features)
        if isinstance(self.config, MlpProjectorConfig):
            return self.fc2(self.activate(self.fc1(features)))
        return self.linear(features)
