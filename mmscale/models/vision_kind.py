"""Base classes of the kinds of vision towers.

A kind is a configuration class and a module in one file. ``vision_config.py`` lists the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock
from data_pipeline.io.strict import StrictConfig
from mmscale.models.tiles import TilesConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product
from mmscale.nn.sizes import Channels, ShrunkTo, Side


class Tower(nn.Module, ABC):
    """Base class of a tower's module."""

    @abstractmethod
    def forward(self, media: MediaBlock) -> Float[Tensor, "F_rows feature_dim"]:
        """Return the features of every patch, in the order of ``media.values``.

        With ``class_feature``, the feature of the class token comes before those of each crop's patches. With
        ``absent_features``, the features of absent tiles come after all others.
        """

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass, in order."""
        return []


class TowerBase(StrictConfig, ABC):
    """Base class of a tower's configuration.

    A subclass has the field ``kind``, and ``class_feature`` and ``tiles`` as fields or class variables. The cost of a
    patch (``cost_per_patch``) includes its operations per ``patches`` and ``tower_rows``, each counted once per patch.
    It leaves out operations per other counts, such as ``tower_pairs``, which grow faster than the number of patches.
    """

    if TYPE_CHECKING:

        @property
        def kind(self) -> str: ...
        @property
        def class_feature(self) -> bool:
            """Whether the first feature of each crop is that of its class token."""

        @property
        def tiles(self) -> TilesConfig | None:
            """Settings for attention between the tiles of an image; None: each crop is computed separately."""

    learns: ClassVar[bool] = True
    """Whether the tower has parameters, which form the component ``vision``."""
    patch_size: Annotated[Side, ShrunkTo(4)]
    """Side of a square patch, pixels."""
    channels: Channels = 3
    """Colour channels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel; subtracted from pixels scaled to 0..1."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 0.5, 0.5)
    """Per channel; divides the pixels after ``mean`` is subtracted."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> TowerBase:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, got {len(self.mean)} and {len(self.std)}")
        return self

    @abstractmethod
    def build(self, backend: Backend, *, absent_features: bool = False) -> Tower:
        """Return the module. With ``absent_features``, its output includes the features of absent tiles, if any."""

    @abstractmethod
    def products(self, *, learns: bool) -> list[Product]:
        """Return the operations of the tower; ``learns``: whether it is trained."""

    @abstractmethod
    def counts(self, media: MediaBlock) -> dict[str, int]:
        """Return the counts of ``media`` that the tower's operations are proportional to."""

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Channels of a feature."""

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) of every crop; None if crops may have any size."""
        return None

    def media_needs(self) -> dict[str, Any]:
        """Return the fields of ``MediaSpec`` that depend on the tower."""
        return {
            "patch_size": self.patch_size,
            "channels": self.channels,
            "fixed_grid": self.fixed_grid,
            "class_features": int(self.class_feature),
            "max_tiles": None if self.tiles is None else self.tiles.max_tiles,
            "computes_absent": self.tiles is not None and self.tiles.attend_absent,
        }
