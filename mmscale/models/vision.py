"""The vision transformer: packed patches of any number of images to packed features, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import AttentionSegments, MediaBlock, Segments
from mmscale.models.tiles import TileRows, TilesConfig, on_device
from mmscale.models.vision_kind import Tower, TowerBase
from mmscale.nn.attention_backends import Backend, num_pairs
from mmscale.nn.block import AttentionConfig, DenseMlpConfig, NormConfig, TransformerBlock, block_products, build_norm
from mmscale.nn.flops import Product, linear
from mmscale.nn.init import set_init_scale
from mmscale.nn.patch_embed import LearnedPositions, PatchEmbed
from mmscale.nn.rope import LearnedPositionsConfig, Rotary2dConfig, Rotation, image_rotation
from mmscale.nn.sizes import Channels, Layers, Width
from mmscale.nn.tile_embed import TileEmbedding, TilePositions

Grids = Sequence[tuple[int, int, int]]


def grid_places(grids: Grids) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every packed patch, int64 ``(P,)`` each."""
    rows = [np.tile(np.repeat(np.arange(height), width), time) for time, height, width in grids]
    columns = [np.tile(np.arange(width), time * height) for time, height, width in grids]
    return np.concatenate(rows), np.concatenate(columns)


class _Idle(torch.autograd.Function):
    """Keeps rows in the graph on which nothing depends: their gradient is zero, where there would be none.

    ZeRO waits for a gradient of every parameter that was gathered.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, idle: Tensor) -> Tensor:
        ctx.idle = idle.shape, idle.dtype
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.idle
        return gradient, gradient.new_zeros(shape, dtype=dtype)


PositionsConfig = Annotated[LearnedPositionsConfig | Rotary2dConfig, Field(discriminator="kind")]


class VisionConfig(TowerBase):
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

    def build(self, backend: Backend, *, absent_features: bool = False) -> VisionTower:
        absent = self.tiles is not None and self.tiles.attend_absent and absent_features
        return VisionTower(self, backend, absent_features=absent)

    def products(self, *, learns: bool) -> list[Product]:
        embed = 2 * self.channels * self.patch_size**2 * self.hidden_dim
        num_global = 0 if self.tiles is None else self.tiles.global_layers
        found = [linear("patches", embed, weights=learns, inputs=False)]
        # The factors of layer_scale and the gates of global blocks need the output of their branch.
        for number, ends_in_product in ((self.num_layers, self.layer_scale is None), (num_global, False)):
            found += number * block_products(
                self.hidden_dim,
                self.attention,
                self.mlp,
                "tower",
                learns=learns,
                flows=learns,
                ends_in_product=ends_in_product,
            )
        return found

    def frames(self, media: MediaBlock) -> Segments:
        """Rows of each frame, class token included: views do not see each other, nor do the frames of a video."""
        if not self.class_token and all(time == 1 for time, _, _ in media.grids):
            return media.items
        extra = int(self.class_token)
        frames = Segments.from_lengths(
            [height * width + extra for time, height, width in media.grids for _ in range(time)]
        )
        return Segments(frames.cu.to(media.items.cu.device), frames.bounds)

    def tile_rows(self, media: MediaBlock) -> TileRows:
        """The stream of a tower with ``tiles``, which sees the tiles of an image together."""
        assert self.tiles is not None
        assert isinstance(self.positions, LearnedPositionsConfig)
        assert len(media.places) == len(media.grids), "collate says where each view belongs"
        height, width = self.positions.grid
        rows = height * width + self.class_token
        return TileRows.of(media.places, rows, self.tiles.max_tiles, self.tiles.attend_absent)

    def counts(self, media: MediaBlock) -> dict[str, int]:
        attended = self.frames(media) if self.tiles is None else self.tile_rows(media).attended
        queries, keys = (attended, attended) if isinstance(attended, Segments) else (attended.queries, attended.keys)
        return {
            "patches": media.items.total,
            "tower_rows": queries.total,
            "tower_pairs": num_pairs(queries, keys),
        }

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


class VisionTower(Tower):
    """A vision transformer.

    Args:
        config: What to build.
        backend: Attention kernel.
        absent_features: Hand on the features of absent tiles as well, behind all others, image after image.

    Source: Dosovitskiy et al. 2021; options as in CLIP, Qwen2-VL, Pixtral and Llama 3.2 Vision.
    """

    def __init__(self, config: VisionConfig, backend: Backend, *, absent_features: bool = False) -> None:
        super().__init__()
        self.config = config
        self.absent_features = absent_features
        self.head_dim = config.attention.resolved_head_dim(config.hidden_dim)
        self.patch_embed = PatchEmbed(
            config.channels,
            config.patch_size,
            config.hidden_dim,
            config.mean,
            config.std,
            config.patch_bias,
            config.temporal_patch,
        )
        if isinstance(config.positions, LearnedPositionsConfig):
            self._build_positions(config.positions.grid)
        self.pre_norm = build_norm(config.norm, config.hidden_dim) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(self._block(backend, None) for _ in range(config.num_layers))
        self.post_norm = build_norm(config.norm, config.hidden_dim) if config.post_norm else nn.Identity()
        num_global = 0 if config.tiles is None else config.tiles.global_layers
        gate = None if config.tiles is None else config.tiles.global_gate_init
        self.global_layers = nn.ModuleList(self._block(backend, gate) for _ in range(num_global))
        set_init_scale(self, config.num_layers + num_global, config.init_std)

    def _build_positions(self, grid: tuple[int, int]) -> None:
        config, tiles = self.config, self.config.tiles
        if tiles is None:
            self.positions: nn.Module = LearnedPositions(grid, config.hidden_dim, config.class_token)
            return
        self.pre_tiles = TileEmbedding(tiles.max_tiles, config.hidden_dim, tiles.gate_init)
        self.positions = TilePositions(grid, config.hidden_dim, config.class_token, tiles.max_tiles, tiles.gate_init)
        self.post_tiles = TileEmbedding(tiles.max_tiles, config.hidden_dim, tiles.gate_init)

    def _block(self, backend: Backend, gate: float | None) -> TransformerBlock:
        config = self.config
        return TransformerBlock(
            config.hidden_dim,
            config.attention,
            config.mlp,
            config.norm,
            backend,
            causal=False,
            layer_scale=config.layer_scale,
            gate=gate,
        )

    def blocks(self) -> list[nn.Module]:
        """All blocks, in order."""
        return [*self.layers, *self.global_layers]

    def forward(self, media: MediaBlock) -> Float[Tensor, "F_rows feature_dim"]:
        """Features of every patch, in the order of ``media.values``, with ``class_feature`` a view's class token first.

        Views do not see each other, nor do frames; with ``tiles`` those of an image do.
        """
        config, positions = self.config, self.config.positions
        tiles = None if config.tiles is None else config.tile_rows(media)
        segments: AttentionSegments = (
            config.frames(media) if tiles is None else on_device(tiles.attended, media.values.device)
        )
        rotation: Rotation | None = None
        hidden = self.patch_embed(media.values)
        if tiles is not None:
            hidden = self._enter_tiles(hidden, tiles)
        elif isinstance(positions, Rotary2dConfig):
            rows, columns = (torch.from_numpy(places).to(hidden.device) for places in grid_places(media.grids))
            rotation = image_rotation(rows, columns, self.head_dim, positions, hidden.dtype)
            hidden = self.pre_norm(hidden)
        else:
            hidden = self.pre_norm(self.positions(hidden))
        outputs = {}
        for number, layer in enumerate(self.layers):
            hidden, _ = layer(hidden, rotation, segments)
            if number in config.feature_layers:
                outputs[number] = hidden
        last, kept = self.post_norm(hidden), [outputs[number] for number in config.feature_layers]
        if tiles is not None:
            last, *kept = self._leave_tiles(last, kept, tiles, segments)
        parts = [last] if config.last_output else []
        if kept and config.feature_order == "channels":
            parts.append(torch.stack(kept, dim=-1).flatten(-2))
        else:
            parts += kept
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if config.idle_layers:
            features = _Idle.apply(features, last)
        if config.class_token and not config.class_feature:
            assert isinstance(positions, LearnedPositionsConfig)
            height, width = positions.grid
            features = features.view(-1, height * width + 1, features.shape[-1])[:, 1:].flatten(0, 1)
        return features

    def _enter_tiles(self, patches: Tensor, rows: TileRows) -> Tensor:
        """Add absent tiles, positions and fillers to patch rows: the stream that enters the first block."""
        tiles = torch.from_numpy(rows.tiles).to(patches.device)
        places = len(patches) // (len(tiles) - rows.num_absent)
        hidden = F.pad(patches, (0, 0, 0, rows.num_absent * places))
        hidden = self.pre_tiles(hidden, tiles.repeat_interleave(places, output_size=len(hidden)))
        hidden = self.pre_norm(self.positions(hidden, tiles))
        if rows.order is not None:
            hidden = F.pad(hidden, (0, 0, 0, 1)).index_select(0, torch.from_numpy(rows.order).to(hidden.device))
        return hidden

    def _leave_tiles(
        self, hidden: Tensor, kept: list[Tensor], rows: TileRows, attended: AttentionSegments
    ) -> list[Tensor]:
        """Run the global blocks. Return their output and the ``kept`` ones, without rows that are no features."""
        hidden = self.post_tiles(hidden, torch.from_numpy(rows.row_tiles).to(hidden.device))
        for layer in self.global_layers:
            hidden, _ = layer(hidden, None, attended)
        if not self.absent_features:
            return [output[: rows.num_real] for output in (hidden, *kept)]
        wanted = torch.from_numpy(np.concatenate([np.arange(rows.num_real), rows.absent])).to(hidden.device)
        return [output.index_select(0, wanted) for output in (hidden, *kept)]
