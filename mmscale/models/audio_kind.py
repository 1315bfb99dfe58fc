"""The base class of the kinds of audio towers, and the kind ``frames``: sound without a tower.

``models/audio.py`` lists the kinds.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from data_pipeline.batch import MediaBlock
from data_pipeline.media_spec import Grid, Reductions, reduced
from mmscale.models.modality import ModalityTower, ModalityTowerBase
from mmscale.nn.attention_backends import Backend
from mmscale.nn.audio_embed import grouped_rows
from mmscale.nn.flops import Product
from mmscale.nn.sizes import Side, Width


class AudioTowerBase(ModalityTowerBase):
    """Base class of an audio tower's configuration. It reads log-mel frames."""

    num_bins: Width = 128
    """Mel bins of a frame."""
    max_frames: Annotated[int, Field(ge=1, le=1 << 16)] = 3000
    """Largest number of frames of a chunk, at 100 frames a second. A longer clip becomes several chunks."""

    @property
    @abstractmethod
    def reductions(self) -> Reductions:
        """The convolutions and poolings that determine the number of rows, see ``AudioSpec.reductions``."""

    @property
    def extra_frames(self) -> int:
        """Frames of silence after a chunk that the tower reads, see ``AudioSpec.extra_frames``."""
        return 0

    def feature_grid(self, grid: Grid) -> Grid:
        return reduced(grid[0] - self.extra_frames, self.reductions), 1, 1

    def media_needs(self) -> dict[str, Any]:
        """Return the fields of ``AudioSpec`` that depend on the tower."""
        return {
            "num_bins": self.num_bins,
            "max_frames": self.max_frames,
            "padded": False,
            "extra_frames": self.extra_frames,
            "reductions": self.reductions,
        }


class FramesConfig(AudioTowerBase):
    """No tower: the features are groups of consecutive mel frames, as they come. It has no parameters.

    The last frames of a chunk that fill no group are left out.
    """

    kind: Literal["frames"]
    learns: ClassVar[bool] = False
    stack: Side = 4
    """Frames of a group, which becomes one feature; at most ``max_frames``."""

    @model_validator(mode="after")
    def _has_a_group(self) -> FramesConfig:
        if self.stack > self.max_frames:
            raise ValueError(f"stack={self.stack}: a chunk has at most max_frames={self.max_frames} frames")
        return self

    @property
    def feature_dim(self) -> int:
        """Channels of a feature: the values of a group of frames."""
        return self.stack * self.num_bins

    @property
    def reductions(self) -> Reductions:
        return ((self.stack, self.stack, 0),)

    def build(self, backend: Backend) -> StackedFrames:
        return StackedFrames(self)

    def products(self, *, learns: bool) -> list[Product]:
        return []

    def counts(self, grid: Grid) -> dict[str, int]:
        return {}


class StackedFrames(ModalityTower):
    """Returns groups of frames, for a projector."""

    def __init__(self, config: FramesConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, block: MediaBlock) -> Float[Tensor, "R feature_dim"]:
        """Return the values of every whole group, in the order (frame, bin)."""
        return grouped_rows(block.values, [time for time, _, _ in block.grids], self.config.stack).flatten(1)
