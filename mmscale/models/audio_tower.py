"""Whisper's encoder over packed log-mel frames of any number of sounds, in one call.

    log-mel (P, bins) --two convolutions, sinusoids--> (R, D) --blocks--> (R, D) --mean of pairs, norm--> (F, D)

The data pipeline cuts a long sound into chunks; an item is one chunk. Whisper fills each chunk with silence to
``max_frames`` and attends the silence (``padded``). Qwen2-Audio masks the keys of the silence, which equals a chunk of
its own length that is followed by the two frames of silence that the convolutions still read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, Segments
from data_pipeline.media_spec import Grid, Reductions
from mmscale.models.audio_kind import AudioTowerBase
from mmscale.models.modality import ModalityTower
from mmscale.nn.attention_backends import Backend, num_pairs
from mmscale.nn.audio_embed import (
    KERNEL,
    STRIDE,
    FrameEmbed,
    FrameLayout,
    Sinusoids,
    grouped_rows,
    spaced_frames,
    strided_rows,
)
from mmscale.nn.block import (
    AttentionConfig,
    DenseMlpConfig,
    NormConfig,
    NormKind,
    TransformerBlock,
    block_products,
    build_norm,
)
from mmscale.nn.flops import Product, linear_product
from mmscale.nn.host import to_device
from mmscale.nn.init import set_init_scale
from mmscale.nn.sizes import Layers, ShrunkTo, Side, Width


class WhisperConfig(AudioTowerBase):
    """Whisper's encoder."""

    kind: Literal["whisper"]
    max_frames: Annotated[int, Field(ge=1, le=1 << 16), ShrunkTo(200)] = 3000
    """Mel frames of a chunk: 3,000 are 30 s. A longer clip becomes several chunks. Must be even."""
    padded: bool = True
    """Fill each chunk with silence up to ``max_frames``, and attend the silence (Whisper). False: chunks of native
    length; the convolutions read two frames of the silence after the sound (Qwen2-Audio)."""
    block_frames: Annotated[Side, ShrunkTo(20)] | None = None
    """Frames after which convolutions, positions and attention start anew (Qwen2.5-Omni: 200). Must be even. Null: once
    for each chunk. Requires ``padded=false``. The sinusoids are then computed; without blocks they are a table of
    ``max_frames / 2`` rows that checkpoints contain and no stage trains, as in Whisper's weights."""
    hidden_dim: Width
    """Width of the tower, an even number."""
    num_layers: Layers
    """Number of blocks."""
    attention: AttentionConfig
    """Heads and biases. Whisper: ``qkv_bias: true, key_bias: false, out_bias: true``."""
    mlp: DenseMlpConfig
    """Feed-forward of the blocks."""
    norm: NormConfig = NormConfig(kind=NormKind.LAYER)
    """Kind and epsilon of all norms."""
    pool: Literal[1, 2] = 1
    """Consecutive rows of an item whose mean becomes one feature, before the last norm (Qwen2-Audio: 2). A single row
    at the end of an item is dropped."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial weights; null: ``1 / sqrt(last dimension)``, the fan-in of projections. Divided
    by ``sqrt(2 * number of blocks)`` for projections that write to the residual stream."""

    @model_validator(mode="after")
    def _consistent(self) -> WhisperConfig:
        self.attention.resolved_head_dim(self.hidden_dim)
        if self.hidden_dim % 2 or self.hidden_dim < 4:
            raise ValueError(f"hidden_dim={self.hidden_dim}: half of the channels are sines; use an even number >= 4")
        for name, frames in (("max_frames", self.max_frames), ("block_frames", self.block_frames)):
            if frames is not None and frames % STRIDE:
                raise ValueError(f"{name}={frames}: the second convolution has stride 2; use an even number")
        if self.block_frames is not None and self.padded:
            raise ValueError("block_frames: divides sounds of native length; set padded=false")
        return self

    @property
    def feature_dim(self) -> int:
        """Channels of a feature: ``hidden_dim``."""
        return self.hidden_dim

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    @property
    def extra_frames(self) -> int:
        # Row i of the output reads frames 2i - 2 to 2i + 2, and its last row may begin at the last frame of the sound.
        return 0 if self.padded or self.block_frames else KERNEL - 1

    @property
    def reductions(self) -> Reductions:
        pool = ((self.pool, self.pool, 0),) if self.pool > 1 else ()
        return ((KERNEL, 1, 1), (KERNEL, STRIDE, 1), *pool)

    def build(self, backend: Backend) -> WhisperTower:
        return WhisperTower(self, backend)

    def pieces(self, grids: Sequence[Grid]) -> list[tuple[int, int, int]]:
        """Return the pieces of ``FrameLayout.from_pieces``: the chunks, or their blocks of ``block_frames``."""
        found, first = [], 0
        for time, _, _ in grids:
            used = time - self.extra_frames
            if self.block_frames is None:
                # The silence ends with the chunk: beyond are the zeros of the convolutions' padding.
                found.append((first, min(time, self.max_frames), used))
            else:
                starts = range(0, used, self.block_frames)
                lengths = [min(self.block_frames, used - start) for start in starts]
                found += [(first + start, length, length) for start, length in zip(starts, lengths, strict=True)]
            first += time
        return found

    def products(self, *, learns: bool) -> list[Product]:
        dim = self.hidden_dim
        return [
            linear_product("convolved_frames", 2 * KERNEL * self.num_bins * dim, weights=learns, inputs=False),
            linear_product("convolved_frames", 2 * KERNEL * dim * dim // STRIDE, weights=learns, inputs=learns),
            *self.num_layers
            * block_products(dim, self.attention, self.mlp, "tower", learns=learns, flows=learns, ends_in_product=True),
        ]

    def counts(self, grid: Grid) -> dict[str, int]:
        pieces = self.pieces([grid])
        rows = Segments.from_lengths([strided_rows(used) for _, _, used in pieces])
        frames = sum(spaced_frames(read) for _, read, _ in pieces)
        return {"convolved_frames": frames, "tower_rows": rows.total, "tower_pairs": num_pairs(rows, rows)}

    def media_needs(self) -> dict[str, Any]:
        return {**super().media_needs(), "padded": self.padded}


class WhisperTower(ModalityTower):
    """Whisper's encoder.

    Args:
        config: Architecture.
        backend: Attention kernel.

    Source: Whisper (arXiv 2212.04356), section 2.2; pooling as in Qwen2-Audio (arXiv 2407.10759), section 2; blocks as
        in Qwen2.5-Omni (arXiv 2503.20215), section 2.2.
    """

    def __init__(self, config: WhisperConfig, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.embed = FrameEmbed(config.num_bins, config.hidden_dim)
        stored = None if config.block_frames else config.max_frames // STRIDE
        self.positions = Sinusoids(stored, config.hidden_dim)
        self.layers = nn.ModuleList(
            TransformerBlock(config.hidden_dim, config.attention, config.mlp, config.norm, backend, causal=False)
            for _ in range(config.num_layers)
        )
        self.post_norm = build_norm(config.norm, config.hidden_dim)
        set_init_scale(self, config.num_layers, config.init_std)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass, in order."""
        return [*self.layers]

    def forward(self, media: MediaBlock) -> Float[Tensor, "F_rows D"]:
        """Return the features of all items, in the order of ``media.values``.

        An item's frames attend each other, or with ``block_frames`` those of their block.
        """
        pieces = self.config.pieces(media.grids)
        layout, device = FrameLayout.from_pieces(pieces, len(media.values)), media.values.device
        hidden = self.embed(media.values, layout)
        hidden = self.positions(hidden, to_device(layout.positions, device))
        lengths = Segments.from_lengths([strided_rows(used) for _, _, used in pieces])
        segments = Segments(to_device(lengths.cu, device), lengths.bounds)
        for layer in self.layers:
            hidden, _ = layer(hidden, None, segments)
        return self.post_norm(self._pooled(hidden, media.grids))

    def _pooled(self, rows: Float[Tensor, "R D"], grids: Sequence[Grid]) -> Float[Tensor, "F_rows D"]:
        if self.config.pool == 1:
            return rows
        lengths = [strided_rows(time - self.config.extra_frames) for time, _, _ in grids]
        return grouped_rows(rows, lengths, self.config.pool).mean(1)
