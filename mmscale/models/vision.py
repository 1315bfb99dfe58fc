"""The vision transformer: computes packed features from the packed patches of any number of images, in one call."""

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
from mmscale.models.windows import WindowRows, WindowsConfig
from mmscale.nn.attention_backends import Backend, num_pairs
from mmscale.nn.block import AttentionConfig, DenseMlpConfig, NormConfig, TransformerBlock, block_products, build_norm
from mmscale.nn.flops import Product, linear_product
from mmscale.nn.host import to_device
from mmscale.nn.init import set_init_scale
from mmscale.nn.patch_embed import BucketedPositions, LearnedPositions, PatchEmbed
from mmscale.nn.rope import (
    BucketedPositionsConfig,
    LearnedPositionsConfig,
    Rotary2dConfig,
    Rotation,
    image_rotation,
)
from mmscale.nn.sizes import Channels, Layers, Width
from mmscale.nn.tile_embed import TileEmbedding, TilePositions

Grids = Sequence[tuple[int, int, int]]


def patch_coordinates(grids: Grids) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the column of every packed patch, int64 ``(P,)`` each."""
    rows = [np.tile(np.repeat(np.arange(height), width), time) for time, height, width in grids]
    columns = [np.tile(np.arange(width), time * height) for time, height, width in grids]
    return np.concatenate(rows), np.concatenate(columns)


class _KeepInGraph(torch.autograd.Function):
    """Returns ``features`` and keeps ``idle`` in the graph, with a gradient of zero instead of none.

    The parameters of idle layers and norms then receive gradients of zero. ZeRO waits for a gradient of every gathered
    parameter.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, idle: Tensor) -> Tensor:
        ctx.idle = idle.shape, idle.dtype
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.idle
        return gradient, gradient.new_zeros(shape, dtype=dtype)


PositionsConfig = Annotated[
    LearnedPositionsConfig | BucketedPositionsConfig | Rotary2dConfig, Field(discriminator="kind")
]


class VisionConfig(TowerBase):
    """A vision transformer over packed patches of any number of images."""

    kind: Literal["transformer"] = "transformer"
    hidden_dim: Width
    """Width of the tower."""
    num_layers: Layers
    """Number of blocks, without those of ``tiles.global_layers``."""
    attention: AttentionConfig
    """Heads, biases, query/key norms."""
    mlp: DenseMlpConfig
    """Feed-forward of the blocks."""
    norm: NormConfig = NormConfig()
    """Kind and epsilon of all norms."""
    positions: PositionsConfig
    """``learned`` for crops of one fixed size; ``bucketed`` or ``rotary_2d`` for crops of any size."""
    class_token: bool = False
    """Put a learned class token first in every crop (CLIP). Features do not contain it unless ``class_feature`` is set.
    Requires ``learned`` positions."""
    class_feature: bool = False
    """Return the class token's feature before those of the crop's patches (Llama 3.2 Vision). Requires ``class_token``,
    and ``connector.pool=class`` or ``connector.kind=cross_attention`` with a projector of kind ``linear`` or ``mlp``
    and ``projector.merge=1``."""
    tiles: TilesConfig | None = None
    """Attention between the tiles of an image (Llama 3.2 Vision); null: every crop is computed separately."""
    windows: WindowsConfig | None = None
    """Attention within windows of a frame (Qwen2.5-VL); null: a patch attends its whole frame in every block. Not with
    ``class_token`` or ``tiles``."""
    patch_bias: bool = False
    """Bias on the patch projection."""
    temporal_patch: Channels = 1
    """Frames that a patch of the projection spans (Qwen2-VL: 2): consecutive chosen frames of a video. A still image
    counts as this many identical frames."""
    pre_norm: bool = False
    """A norm before the first block (CLIP, Pixtral)."""
    post_norm: bool = True
    """A norm after the last block."""
    layer_scale: float | None = None
    """Initial value of learned per-channel factors on the residual branches (InternViT: 0.1); null for no factors."""
    feature_layers: tuple[int, ...] = ()
    """0-based blocks whose outputs are concatenated after the last output, without ``post_norm`` (Llama 3.2 Vision)."""
    feature_order: Literal["layers", "channels"] = "layers"
    """Order of the channels of ``feature_layers``. ``layers``: all channels of one block, then those of the next.
    ``channels``: the first channel of each block, then the second, ... (Llama 3.2 Vision)."""
    last_output: bool = True
    """Whether features contain the output of the last block, after ``post_norm``. False: only ``feature_layers``
    (Molmo)."""
    idle_layers: int = Field(default=0, ge=0, le=1 << 12)
    """Number of blocks after the last of ``feature_layers`` without effect on the features; only with
    ``last_output=false``. They exist because published weights contain them (Molmo, LLaVA: 1). They are computed, and
    their gradients are zero."""
    idle_norm: bool = False
    """A norm after the last block without effect on the features, which published weights contain (Aria, LLaVA). Its
    gradient is zero. Requires ``post_norm=false``."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial weights; null: ``1 / sqrt(last dimension)``, the fan-in of projections. Divided
    by ``sqrt(2 * number of blocks)`` for projections that write to the residual stream."""

    @property
    def feature_dim(self) -> int:
        """Channels of a feature: the outputs of all concatenated blocks."""
        return self.hidden_dim * (len(self.feature_layers) + self.last_output)

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) of every crop; None if crops may have any size."""
        return self.positions.grid if isinstance(self.positions, LearnedPositionsConfig) else None

    def build(self, backend: Backend, *, absent_features: bool = False) -> VisionTower:
        absent = self.tiles is not None and self.tiles.attend_absent and absent_features
        return VisionTower(self, backend, absent_features=absent)

    def products(self, *, learns: bool) -> list[Product]:
        embed = 2 * self.channels * self.patch_size**2 * self.hidden_dim
        num_global = 0 if self.tiles is None else self.tiles.global_layers
        found = [linear_product("patches", embed, weights=learns, inputs=False)]
        if self.temporal_patch > 1:  # In addition, because the patches of videos are also projected as still images.
            found.append(linear_product("video_patches", embed * self.temporal_patch, weights=learns, inputs=False))
        # The gradients of layer_scale's factors and of the global blocks' gates need the output of their branch.
        num_windowed = 0 if self.windows is None else self.num_layers - len(self.windows.frame_layers)
        kinds = (
            (self.num_layers - num_windowed, "tower_pairs", self.layer_scale is None),
            (num_windowed, "window_pairs", self.layer_scale is None),
            (num_global, "tower_pairs", False),
        )
        for number, pairs, ends_in_product in kinds:
            found += number * block_products(
                self.hidden_dim,
                self.attention,
                self.mlp,
                "tower",
                pairs=pairs,
                learns=learns,
                flows=learns,
                ends_in_product=ends_in_product,
            )
        return found

    def media_needs(self) -> dict[str, Any]:
        return {**super().media_needs(), "frames_per_patch": self.temporal_patch}

    def frames(self, media: MediaBlock) -> Segments:
        """Return segments of the rows of each frame, class tokens included. Rows attend only within their frame."""
        if not self.class_token and all(time == 1 for time, _, _ in media.grids):
            return media.items
        extra = int(self.class_token)
        frames = Segments.from_lengths(
            [height * width + extra for time, height, width in media.grids for _ in range(time)]
        )
        return Segments(to_device(frames.cu, media.items.cu.device), frames.bounds)

    def window_rows(self, media: MediaBlock) -> WindowRows | None:
        """Return the row order of a tower with ``windows``; None without."""
        return None if self.windows is None else WindowRows.from_grids(media.grids, self.windows.side)

    def tile_rows(self, media: MediaBlock) -> TileRows:
        """Return the row sequence of a tower with ``tiles``, in which the tiles of an image attend to each other."""
        assert self.tiles is not None
        assert isinstance(self.positions, LearnedPositionsConfig)
        assert len(media.locations) == len(media.grids), "collate sets the location of each crop"
        height, width = self.positions.grid
        rows = height * width + self.class_token
        return TileRows.from_locations(media.locations, rows, self.tiles.max_tiles, self.tiles.attend_absent)

    def counts(self, media: MediaBlock) -> dict[str, int]:
        attended = self.frames(media) if self.tiles is None else self.tile_rows(media).attended
        queries, keys = (attended, attended) if isinstance(attended, Segments) else (attended.queries, attended.keys)
        rows = self.window_rows(media)
        return {
            "patches": media.items.total,
            "video_patches": len(media.later_index),
            "tower_rows": queries.total,
            "tower_pairs": num_pairs(queries, keys),
            "window_pairs": 0 if rows is None else num_pairs(rows.windows, rows.windows),
        }

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        head_dim = self.attention.resolved_head_dim(self.hidden_dim)
        if isinstance(self.positions, Rotary2dConfig) and head_dim % 4:
            raise ValueError(f"positions.kind=rotary_2d needs heads of a multiple of 4 channels, got {head_dim}")
        kind = self.positions.kind
        if self.class_token and kind != "learned":
            raise ValueError(f"class_token: has no position in the grid of {kind}; use positions.kind=learned")
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
        if self.idle_norm and self.post_norm:
            raise ValueError("idle_norm: post_norm would be a second norm of the last output; set post_norm=false")
        if self.class_feature and not self.class_token:
            raise ValueError("class_feature: there is no class token to keep; set class_token=true")
        if self.tiles is not None:
            self._check_tiles(self.tiles)
        if self.windows is not None:
            self.windows.check(self.num_layers)
            if self.class_token or self.tiles is not None:
                raise ValueError("windows: cut frames of patches alone; leave out class_token and tiles")
        return self

    def _check_tiles(self, tiles: TilesConfig) -> None:
        if not isinstance(self.positions, LearnedPositionsConfig):
            raise ValueError(f"tiles: all have the same size; use positions.kind=learned, not {self.positions.kind}")
        if not self.last_output:
            raise ValueError("last_output=false: the blocks of tiles.global_layers would be unused; set it to true")
        if tiles.attend_absent and self.patch_bias:
            raise ValueError("tiles.attend_absent: an absent tile has no patches to project; set patch_bias=false")


class VisionTower(Tower):
    """A vision transformer.

    Args:
        config: Architecture.
        backend: Attention kernel.
        absent_features: Also return the features of absent tiles, image after image, after all other features. Requires
            ``config.tiles.attend_absent``.

    Source: Dosovitskiy et al. 2021; options as in CLIP, Qwen2-VL, Pixtral and Llama 3.2 Vision.
    """

    positions: nn.Module

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
        elif isinstance(config.positions, BucketedPositionsConfig):
            self.positions = BucketedPositions(config.positions.grid, config.hidden_dim)
        self.pre_norm = build_norm(config.norm, config.hidden_dim) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(self._block(backend, None) for _ in range(config.num_layers))
        self.post_norm = build_norm(config.norm, config.hidden_dim) if config.post_norm else nn.Identity()
        self.idle_norm = build_norm(config.norm, config.hidden_dim) if config.idle_norm else nn.Identity()
        num_global = 0 if config.tiles is None else config.tiles.global_layers
        gate = None if config.tiles is None else config.tiles.global_gate_init
        self.global_layers = nn.ModuleList(self._block(backend, gate) for _ in range(num_global))
        set_init_scale(self, config.num_layers + num_global, config.init_std)

    def _build_positions(self, grid: tuple[int, int]) -> None:
        config, tiles = self.config, self.config.tiles
        if tiles is None:
            self.positions = LearnedPositions(grid, config.hidden_dim, config.class_token)
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
        """Return all blocks, in order."""
        return [*self.layers, *self.global_layers]

    def forward(self, media: MediaBlock) -> Float[Tensor, "F_rows feature_dim"]:
        """Return the features of every patch, in the order of ``media.values``.

        With ``class_feature``, the class token's feature comes first in each crop. Patches attend only within their
        frame, with ``windows`` in most blocks only within their window of it, or, with ``tiles``, within their image.
        """
        config, positions = self.config, self.config.positions
        tiles = None if config.tiles is None else config.tile_rows(media)
        segments: AttentionSegments = (
            config.frames(media) if tiles is None else on_device(tiles.attended, media.values.device)
        )
        rotation: Rotation | None = None
        hidden = self.patch_embed(media.values, media.later_values, media.later_index)
        windows = config.window_rows(media)
        if tiles is not None:
            hidden = self._tile_inputs(hidden, tiles)
        elif isinstance(positions, Rotary2dConfig):
            coordinates = patch_coordinates(media.grids)
            if windows is not None:
                coordinates = coordinates[0][windows.order], coordinates[1][windows.order]
            rows, columns = (to_device(axis, hidden.device) for axis in coordinates)
            rotation = image_rotation(rows, columns, self.head_dim, positions, hidden.dtype)
            hidden = self.pre_norm(hidden)
        elif isinstance(positions, BucketedPositionsConfig):
            hidden = self.pre_norm(self.positions(hidden, media.grids))
        else:
            hidden = self.pre_norm(self.positions(hidden))
        attended = [segments] * len(self.layers)
        if windows is not None and config.windows is not None:
            hidden = hidden.index_select(0, to_device(windows.order, hidden.device))
            within = on_device(windows.windows, hidden.device)
            frame_layers = config.windows.frame_layers
            attended = [segments if number in frame_layers else within for number in range(len(self.layers))]
        outputs = {}
        for number, (layer, own) in enumerate(zip(self.layers, attended, strict=True)):
            hidden, _ = layer(hidden, rotation, own)
            if number in config.feature_layers:
                outputs[number] = hidden
        last, inner = self.post_norm(hidden), [outputs[number] for number in config.feature_layers]
        if tiles is not None:
            last, *inner = self._tile_outputs(last, inner, tiles, segments)
        parts = [last] if config.last_output else []
        if inner and config.feature_order == "channels":
            parts.append(torch.stack(inner, dim=-1).flatten(-2))
        else:
            parts += inner
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if windows is not None:
            features = features.index_select(0, to_device(windows.restore, features.device))
        if config.idle_layers or config.idle_norm:
            features = _KeepInGraph.apply(features, self.idle_norm(last))
        if config.class_token and not config.class_feature:
            assert isinstance(positions, LearnedPositionsConfig)
            height, width = positions.grid
            features = features.view(-1, height * width + 1, features.shape[-1])[:, 1:].flatten(0, 1)
        return features

    def _tile_inputs(self, patches: Tensor, rows: TileRows) -> Tensor:
        """Return the input of the first block: patch rows with absent tiles, positions and fillers added."""
        tiles = to_device(rows.tiles, patches.device)
        num_patches = len(patches) // (len(tiles) - rows.num_absent)
        hidden = F.pad(patches, (0, 0, 0, rows.num_absent * num_patches))
        hidden = self.pre_tiles(hidden, tiles.repeat_interleave(num_patches, output_size=len(hidden)))
        hidden = self.pre_norm(self.positions(hidden, tiles))
        if rows.order is not None:
            hidden = F.pad(hidden, (0, 0, 0, 1)).index_select(0, to_device(rows.order, hidden.device))
        return hidden

    def _tile_outputs(
        self, hidden: Tensor, inner: list[Tensor], rows: TileRows, attended: AttentionSegments
    ) -> list[Tensor]:
        """Run the global blocks. Return their output and the ``inner`` outputs, without fillers.

        Rows of absent tiles are left out too, unless ``absent_features`` is set.
        """
        hidden = self.post_tiles(hidden, to_device(rows.row_tiles, hidden.device))
        for layer in self.global_layers:
            hidden, _ = layer(hidden, None, attended)
        if not self.absent_features:
            return [output[: rows.num_real] for output in (hidden, *inner)]
        wanted = to_device(np.concatenate([np.arange(rows.num_real), rows.absent]), hidden.device)
        return [output.index_select(0, wanted) for output in (hidden, *inner)]
