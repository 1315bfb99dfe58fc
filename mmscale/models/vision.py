"""Vision towers: packed patches of any number of images to packed features, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.config import PatchesConfig, VisionConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.block import TransformerBlock
from mmscale.nn.init import set_init_scale
from mmscale.nn.norms import build_norm
from mmscale.nn.patch_embed import LearnedPositions, PatchEmbed, normalised
from mmscale.nn.rope import LearnedPositionsConfig, Rotary2dConfig, Rotation, image_rotation

Grids = Sequence[tuple[int, int, int]]


def frame_lengths(grids: Grids, extra: int = 0) -> list[int]:
    """Rows of each frame; frames of a video are views of their own. ``extra`` rows are added to each."""
    return [height * width + extra for time, height, width in grids for _ in range(time)]


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


class PixelPatches(nn.Module):
    """In the place of a tower: patches as they are, for a connector that projects pixels.

    Normalised in float32 whatever the weights are, so that a pixel is rounded to their format once.

    Source: Fuyu-8B's model card.
    """

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()

    def forward(self, media: MediaBlock) -> Float[Tensor, "P patch_dim"]:
        """Pixels of every patch, each laid out (channel, row, column)."""
        config = self.config
        return normalised(media.values, config.channels, config.mean, config.std, torch.float32)


class VisionTower(nn.Module):
    """A vision transformer.

    Source: Dosovitskiy et al. 2021; options as in CLIP, Qwen2-VL and Pixtral.
    """

    def __init__(self, config: VisionConfig, backend: Backend) -> None:
        super().__init__()
        self.config = config
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
            self.positions = LearnedPositions(config.positions.grid, config.hidden_dim, config.class_token)
        self.pre_norm = build_norm(config.norm, config.hidden_dim) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.hidden_dim,
                config.attention,
                config.mlp,
                config.norm,
                backend,
                causal=False,
                layer_scale=config.layer_scale,
            )
            for _ in range(config.num_layers)
        )
        self.post_norm = build_norm(config.norm, config.hidden_dim) if config.post_norm else nn.Identity()
        set_init_scale(self, config.num_layers, config.init_std)

    def forward(self, media: MediaBlock) -> Float[Tensor, "P feature_dim"]:
        """Features of every patch, in the order of ``media.values``; frames do not see each other."""
        hidden = self.patch_embed(media.values)
        if isinstance(self.config.positions, LearnedPositionsConfig):
            hidden = self.positions(hidden)
        hidden = self.pre_norm(hidden)
        segments = self._frames(media, hidden.device)
        rotation = self._rotation(media, hidden)
        kept = {}
        for number, layer in enumerate(self.layers):
            hidden, _ = layer(hidden, rotation, segments)
            if number in self.config.feature_layers:
                kept[number] = hidden
        outputs = [self.post_norm(hidden)] if self.config.last_output else []
        outputs += [kept[number] for number in self.config.feature_layers]
        features = self._patches_only(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1))
        return _Idle.apply(features, hidden) if self.config.idle_layers else features

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

    def _patches_only(self, features: Tensor) -> Tensor:
        """Drops the class rows."""
        if not self.config.class_token:
            return features
        assert isinstance(self.config.positions, LearnedPositionsConfig)
        height, width = self.config.positions.grid
        return features.view(-1, height * width + 1, features.shape[-1])[:, 1:].flatten(0, 1)
