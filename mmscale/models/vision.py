"""Vision towers: packed patches of any number of images to packed features, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import AttentionSegments, MediaBlock, Segments
from mmscale.models.tiles import TileRows, on_device
from mmscale.models.vision_config import PatchesConfig, VisionConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.block import TransformerBlock
from mmscale.nn.init import set_init_scale
from mmscale.nn.norms import build_norm
from mmscale.nn.patch_embed import LearnedPositions, PatchEmbed, normalised
from mmscale.nn.rope import LearnedPositionsConfig, Rotary2dConfig, Rotation, image_rotation
from mmscale.nn.tile_embed import TileEmbedding, TilePositions

Grids = Sequence[tuple[int, int, int]]


def frame_lengths(grids: Grids, extra: int = 0) -> list[int]:
    """Rows of each frame; frames of a video are views of their own. ``extra`` rows are added to each."""
    return [height * width + extra for time, height, width in grids for _ in range(time)]


def grid_places(grids: Grids) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every packed patch, int64 ``(P,)`` each."""
    rows = [np.tile(np.repeat(np.arange(height), width), time) for time, height, width in grids]
    columns = [np.tile(np.arange(width), time * height) for time, height, width in grids]
    return np.concatenate(rows), np.concatenate(columns)


def tile_rows(config: VisionConfig | PatchesConfig, media: MediaBlock) -> TileRows | None:
    """The stream of a tower that sees the tiles of an image together; None of any other."""
    if config.tiles is None:
        return None
    assert isinstance(config.positions, LearnedPositionsConfig)
    assert len(media.places) == len(media.grids), "collate says where each view belongs"
    height, width = config.positions.grid
    rows = height * width + config.class_token
    return TileRows.of(media.places, rows, config.tiles.max_tiles, config.tiles.attend_absent)


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


class PixelPatches(nn.Module):
    """In the place of a tower: patches as they are, for a connector that projects pixels.

    Normalised in float32 whatever the weights are, so that a pixel is rounded to their format once.

    Source: Fuyu-8B's model card.
    """

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, media: MediaBlock) -> Float[Tensor, "P patch_dim"]:
        """Pixels of every patch, each laid out (channel, row, column)."""
        config = self.config
        return normalised(media.values, config.channels, config.mean, config.std, torch.float32)


class VisionTower(nn.Module):
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
        tiles = tile_rows(self.config, media)
        hidden = self.patch_embed(media.values)
        if tiles is not None:
            return self._features_of_tiles(hidden, tiles)
        if isinstance(self.config.positions, LearnedPositionsConfig):
            hidden = self.positions(hidden)
        hidden = self.pre_norm(hidden)
        hidden, kept = self._through_layers(hidden, self._frames(media, hidden.device), self._rotation(media, hidden))
        return self._kept_rows(self._joined(self.post_norm(hidden), kept))

    def _features_of_tiles(self, patches: Tensor, rows: TileRows) -> Tensor:
        tiles, row_tiles = (torch.from_numpy(each).to(patches.device) for each in (rows.tiles, rows.row_tiles))
        attended = on_device(rows.attended, patches.device)
        places = len(patches) // (len(tiles) - rows.num_absent)
        hidden = F.pad(patches, (0, 0, 0, rows.num_absent * places))
        hidden = self.pre_tiles(hidden, tiles.repeat_interleave(places, output_size=len(hidden)))
        hidden = self.pre_norm(self.positions(hidden, tiles))
        if rows.order is not None:
            hidden = F.pad(hidden, (0, 0, 0, 1)).index_select(0, torch.from_numpy(rows.order).to(hidden.device))
        hidden, kept = self._through_layers(hidden, attended, None)
        hidden = self.post_tiles(self.post_norm(hidden), row_tiles)
        for layer in self.global_layers:
            hidden, _ = layer(hidden, None, attended)
        if self.absent_features:
            wanted = torch.from_numpy(np.concatenate([np.arange(rows.num_real), rows.absent])).to(hidden.device)
            hidden, *kept = (output.index_select(0, wanted) for output in (hidden, *kept))
        else:
            hidden, *kept = (output[: rows.num_real] for output in (hidden, *kept))
        return self._kept_rows(self._joined(hidden, kept))

    def _through_layers(
        self, hidden: Tensor, segments: AttentionSegments, rotation: Rotation | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The last output and those of ``feature_layers``."""
        kept = {}
        for number, layer in enumerate(self.layers):
            hidden, _ = layer(hidden, rotation, segments)
            if number in self.config.feature_layers:
                kept[number] = hidden
        return hidden, [kept[number] for number in self.config.feature_layers]

    def _joined(self, last: Tensor, kept: list[Tensor]) -> Tensor:
        outputs = [last] if self.config.last_output else []
        if kept and self.config.feature_order == "channels":
            outputs.append(torch.stack(kept, dim=-1).flatten(-2))
        else:
            outputs += kept
        features = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return _Idle.apply(features, last) if self.config.idle_layers else features

    def _frames(self, media: MediaBlock, device: torch.device) -> Segments:
        if not self.config.class_token and all(grid[0] == 1 for grid in media.grids):
            return media.items
        frames = Segments.from_lengths(frame_lengths(media.grids, extra=int(self.config.class_token)))
        return Segments(frames.cu.to(device), frames.bounds)

    def _rotation(self, media: MediaBlock, hidden: Tensor) -> Rotation | None:
        positions = self.config.positions
        if not isinstance(positions, Rotary2dConfig):
            return None
        rows, columns = (torch.from_numpy(places).to(hidden.device) for places in grid_places(media.grids))
        return image_rotation(rows, columns, self.head_dim, positions, hidden.dtype)

    def _kept_rows(self, features: Tensor) -> Tensor:
        """Drops the class rows, unless they are features."""
        if not self.config.class_token or self.config.class_feature:
            return features
        assert isinstance(self.config.positions, LearnedPositionsConfig)
        height, width = self.config.positions.grid
        return features.view(-1, height * width + 1, features.shape[-1])[:, 1:].flatten(0, 1)
