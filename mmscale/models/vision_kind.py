"""What every kind of vision tower states about itself.

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
    """The module of a tower."""

    @abstractmethod
    def forward(self, media: MediaBlock) -> Float[Tensor, "F_rows feature_dim"]:
        """Return the features of every patch, in the order of ``media.values``."""

    def blocks(self) -> list[nn.Module]:
        """Blocks worth recomputing in the backward pass, in order."""
        return []


class TowerBase(StrictConfig, ABC):
    """A kind of tower. A kind has the field ``kind``, and ``class_feature`` and ``tiles`` as fields or class variables.

    Its operations are proportional to the counts ``patches`` and ``tower_rows``, which grow by one with each patch, and
    to counts that depend on more than the number of patches, such as ``tower_pairs``.
    """

    if TYPE_CHECKING:

        @property
        def kind(self) -> str: ...
        @property
        def class_feature(self) -> bool:
            """Whether the first feature of a view is that of its class token."""

        @property
        def tiles(self) -> TilesConfig | None:
            """How the tiles of an image are computed together; None: each view by itself."""

    learns: ClassVar[bool] = True
    """Whether the tower has parameters: the component ``vision``."""
    patch_size: Annotated[Side, ShrunkTo(4)]
    """Side of a square patch, pixels."""
    channels: Channels = 3
    """Colour channels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from pixels scaled to 0..1, per channel."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 0.5, 0.5)
    """Divides after that, per channel."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> TowerBase:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, got {len(self.mean)} and {len(self.std)}")
        return self

    @abstractmethod
    def build(self, backend: Backend, *, absent_features: bool = False) -> Tower:
        """Return the module; ``absent_features``: it also returns features of absent tiles, if there are any."""

    @abstractmethod
    def products(self, *, learns: bool) -> list[Product]:
        """Operations of the tower while it learns or not."""

    @abstractmethod
    def counts(self, media: MediaBlock) -> dict[str, int]:
        """What the tower's operations over ``media`` are proportional to."""

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Channels of a feature."""

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) of every view; None for any size."""
        return None

    def media_needs(self) -> dict[str, Any]:
        """Fields of ``MediaSpec`` that follow from the tower."""
        return {
            "patch_size": self.patch_size,
            "channels": self.channels,
            "fixed_grid": self.fixed_grid,
            "class_features": int(self.class_feature),
            "max_tiles": None if self.tiles is None else self.tiles.max_tiles,
            "computes_absent": self.tiles is not None and self.tiles.attend_absent,
        }
