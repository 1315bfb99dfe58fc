"""Configuration of a vision tower, or of patches in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.norms import NormConfig
from mmscale.nn.rope import LearnedPositionsConfig, Rotary2dConfig
from mmscale.nn.sizes import MOST_TILES, Channels, Layers, Side, Width

PositionsConfig = Annotated[LearnedPositionsConfig | Rotary2dConfig, Field(discriminator="kind")]


class TilesConfig(StrictConfig):
    """The tiles of an image know their places in it and see each other.

    Source: Llama 3 (arXiv 2407.21783, section 7.1) and the reference code of Llama 3.2 Vision.
    """

    max_tiles: int = Field(default=4, ge=1, le=MOST_TILES)
    """Tiles of an image at most: tables have a row for each grid of so many."""
    global_layers: int = Field(default=8, ge=0, le=1 << 12)
    """Gated blocks behind ``post_norm`` and a second embedding of tiles; ``last_output`` is theirs."""
    attend_absent: bool = True
    """Compute absent tiles and rows that fill up each tile, and let every patch attend them, as the published weights
    were trained: an image costs ``max_tiles`` tiles. False: real patches alone, which computes something else."""
    gate_init: float = 0.0
    """Start of the gates of embeddings of tiles; 0 as published: without effect at first."""
    global_gate_init: float = math.pi / 4
    """Start of the gates in the global blocks."""


class _Pixels(StrictConfig):
    patch_size: Side
    """Side of a square patch, pixels."""
    channels: Channels = 3
    """Colour channels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from pixels scaled to 0..1, per channel."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 0.5, 0.5)
    """Divides after that, per channel."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> _Pixels:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, got {len(self.mean)} and {len(self.std)}")
        return self


class PatchesConfig(_Pixels):
    """No tower: the features of a patch are its normalised pixels (Fuyu). It has no parameters."""

    kind: Literal["patches"]
    class_feature: ClassVar[bool] = False
    tiles: ClassVar[None] = None

    @property
    def feature_dim(self) -> int:
        """Channels of a patch's features."""
        return self.channels * self.patch_size**2

    @property
    def fixed_grid(self) -> None:
        """Views of any size."""
        return None


class VisionConfig(_Pixels):
    """A vision transformer over packed patches of any number of images."""

    kind: Literal["transformer"] = "transformer"
    hidden_dim: Width
    """Width of the tower."""
    num_layers: Layers
    """Blocks."""
    attention: AttentionConfig
    """Heads, biases, per-head norms."""
    mlp: DenseMlpConfig
    """Feed-forward of the blocks."""
    norm: NormConfig = NormConfig()
    """Kind and epsilon of all norms."""
    positions: PositionsConfig
    """``learned`` for views of one fixed size, ``rotary_2d`` for native resolution."""
    class_token: bool = False
    """Put a learned token first in every view (CLIP); it is dropped from the features. ``learned`` positions only."""
    class_feature: bool = False
    """Keep it: a view's first feature is its class token's (Llama 3.2 Vision). For cross-attention, and
    for ``connector.pool=class``."""
    tiles: TilesConfig | None = None
    """Tiles of an image are computed together (Llama 3.2 Vision); null: every view is by itself."""
    patch_bias: bool = False
    """Bias on the patch projection."""
    temporal_patch: Channels = 1
    """Frames that the patch projection has weights for; a still image counts as so many equal ones (Qwen2-VL: 2)."""
    pre_norm: bool = False
    """A norm before the first block (CLIP, Pixtral)."""
    post_norm: bool = True
    """A norm after the last block."""
    layer_scale: float | None = None
    """Start of learned per-channel factors on the branches (InternViT: 0.1); null for none."""
    feature_layers: tuple[int, ...] = ()
    """0-based blocks whose outputs, not normalised, are concatenated behind the last one's (Llama 3.2 Vision)."""
    feature_order: Literal["layers", "channels"] = "layers"
    """How those of ``feature_layers`` lie: one block's channels after the other's, or the first channel of all blocks,
    then the second, ... (Llama 3.2 Vision)."""
    last_output: bool = True
    """Whether features hold the last block's output, normalised; if not, ``feature_layers`` alone (Molmo)."""
    idle_layers: int = Field(default=0, ge=0, le=1 << 12)
    """Blocks behind the last of ``feature_layers``, kept because published weights hold them (Molmo: 1). They are
    computed and learn nothing."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the first weights; null: ``1 / sqrt(fan-in)``."""

    @property
    def feature_dim(self) -> int:
        """Channels of a patch's features."""
        return self.hidden_dim * (len(self.feature_layers) + self.last_output)

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) of every view; None for any size."""
        return self.positions.grid if isinstance(self.positions, LearnedPositionsConfig) else None

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        head_dim = self.attention.resolved_head_dim(self.hidden_dim)
        if isinstance(self.positions, Rotary2dConfig):
            if head_dim % 4:
                raise ValueError(f"positions.kind=rotary_2d needs heads of a multiple of 4 channels, got {head_dim}")
            if self.class_token:
                raise ValueError("class_token: has no place in the grid of rotary_2d positions; use learned positions")
        if any(not 0 <= layer < self.num_layers for layer in self.feature_layers):
            raise ValueError(
                f"feature_layers={list(self.feature_layers)}: blocks are numbered 0..{self.num_layers - 1}"
            )
        unused = 0 if self.last_output else self.num_layers - 1 - max(self.feature_layers, default=-1)
        if unused != self.idle_layers:
            if not self.idle_layers:
                raise ValueError(
                    "last_output=false: the last block's output is unused; build fewer blocks, name it in "
                    f"feature_layers, or keep it as it is with idle_layers={unused}"
                )
            raise ValueError(f"idle_layers={self.idle_layers}: the outputs of the last {unused} blocks are unused")
        if not self.last_output and self.post_norm:
            raise ValueError("last_output=false: post_norm would normalise nothing; set post_norm=false")
        if self.class_feature and not self.class_token:
            raise ValueError("class_feature: there is no class token to keep; set class_token=true")
        if self.tiles is not None:
            self._check_tiles(self.tiles)
        return self

    def _check_tiles(self, tiles: TilesConfig) -> None:
        if isinstance(self.positions, Rotary2dConfig):
            raise ValueError("tiles: are of one size each; use positions.kind=learned, not rotary_2d")
        if not self.last_output:
            raise ValueError("last_output=false: what tiles do behind the last block would be unused")
        if tiles.attend_absent and self.patch_bias:
            raise ValueError("tiles.attend_absent: an absent tile has no patches to project; set patch_bias=false")


def _vision_kind(value: Any) -> Any:
    """A block without ``kind`` is a transformer."""
    if isinstance(value, Mapping):
        return value.get("kind", "transformer")
    return getattr(value, "kind", None)


AnyVisionConfig = Annotated[
    Annotated[VisionConfig, Tag("transformer")] | Annotated[PatchesConfig, Tag("patches")],
    Discriminator(_vision_kind),
]
