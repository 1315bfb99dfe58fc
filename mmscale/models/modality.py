"""Base classes of the model side of a modality besides images: a tower and a projector.

    MediaBlock --tower--> rows --projector--> features, each written over its placeholder's embedding

To add a modality, derive a configuration from ``ModalityBase`` and give ``ModelConfig`` a field for it, with the name
of its field in ``MediaSpec``. The tower is the component NAME, the projector the component NAME_connector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Grid, ModalitySpec
from mmscale.models.connectors.projector import ProjectorBase
from mmscale.models.projector_config import projector_products
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product


class ModalityTower(nn.Module, ABC):
    """Base class of a tower's module."""

    @abstractmethod
    def forward(self, block: MediaBlock) -> Float[Tensor, "R feature_dim"]:
        """Return the rows of every item, item after item; ``ModalityTowerBase.feature_grid`` gives their number."""

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass, in order."""
        return []


class ModalityTowerBase(StrictConfig, ABC):
    """Base class of a tower's configuration. A subclass has a field ``kind``."""

    learns: ClassVar[bool] = True
    """Whether the tower has parameters, which form a component."""

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Channels of a row."""

    @property
    def num_blocks(self) -> int:
        """Number of its transformer blocks, for estimates of the time of a step. A tower with blocks has a count
        ``tower_rows``, the rows that each of them reads."""
        return 0

    @abstractmethod
    def build(self, backend: Backend) -> ModalityTower:
        """Return the module."""

    @abstractmethod
    def feature_grid(self, grid: Grid) -> Grid:
        """Return the rows that the tower makes of an item, along the same axes as ``grid``."""

    @abstractmethod
    def products(self, *, learns: bool) -> list[Product]:
        """Return the operations of the tower; ``learns``: whether it is trained."""

    @abstractmethod
    def counts(self, grid: Grid) -> dict[str, int]:
        """Return the counts of one item that the tower's operations are proportional to."""


class ModalityBase(StrictConfig, ABC):
    """Base class of a modality's configuration: the fields ``tower`` and ``projector``."""

    if TYPE_CHECKING:  # Each modality declares the fields itself, with its own kinds.

        @property
        def tower(self) -> ModalityTowerBase: ...
        @property
        def projector(self) -> ProjectorBase: ...

    @abstractmethod
    def spec(self, cost_per_patch: float) -> ModalitySpec:
        """Return the inputs of the modality."""

    def build(self, backend: Backend, dim: int) -> tuple[ModalityTower, nn.Module]:
        """Return the modules of tower and projector; ``dim`` is the width of the decoder."""
        return self.tower.build(backend), self.projector.build(self.tower.feature_dim, dim)

    def feature_grids(self, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        """Return the rows that the projector gets of each item."""
        return tuple(map(self.tower.feature_grid, grids))

    def products(self, name: str, dim: int, trained: Collection[str], reached: Collection[str]) -> list[Product]:
        """Return the operations of tower and projector. Names of counts begin with ``NAME.``.

        Args:
            name: Name of the modality.
            dim: Width of the decoder.
            trained: Components whose weights are trained.
            reached: These, and the components that hold trained adapters.
        """
        connector, tower_learns = f"{name}_connector", self.tower.learns and name in reached
        projected = projector_products(
            self.projector,
            self.tower.feature_dim,
            dim,
            learns=connector in reached,
            tower_learns=tower_learns,
            learns_before=False,
        )
        parts = ((name, self.tower.products(learns=tower_learns)), (connector, projected))
        return [
            (each if component in trained else each.with_frozen_weight())._replace(per=f"{name}.{each.per}")
            for component, products in parts
            for each in products
        ]

    def counts(self, name: str, grids: Sequence[Grid]) -> dict[str, int]:
        """Return the counts of items that the operations are proportional to, with all names that ``products`` uses."""
        inputs = self.spec(1.0)
        total = {"feature_patches": 0, "features": 0, "frames": 0, "passes": 1}
        total |= dict.fromkeys(self.tower.counts(inputs.minimal_grid), 0)
        for grid in grids:
            rows = math.prod(self.tower.feature_grid(grid))
            own = {"feature_patches": rows, "features": inputs.num_features(grid), "frames": 1}
            for key, count in (own | self.tower.counts(grid)).items():
                total[key] += count
        return {f"{name}.{key}": count for key, count in total.items()}
