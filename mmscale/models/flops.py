"""Floating-point operations by formula: of a forward, of a training step, and of a patch beside a token.

A multiply-add counts as two. Matrix products alone count, as in torch's ``FlopCounterMode``; attention counts the full
rectangle of queries and keys of a segment, causal or not, so that figures compare with published ones.

A product of the forward pass costs as much again for the gradient of its weights, and once more for that of its inputs,
each only where it is wanted. A frozen tower has neither; a frozen decoder behind a trained connector has the second.

Source: Kaplan et al. 2020 (arXiv 2001.08361), table 1; PaLM (arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from mmscale.models.config import DecoderConfig, ModelConfig
from mmscale.models.connector_config import (
    AttentionPoolConfig,
    CAbstractorConfig,
    ContrastiveConnectorConfig,
    CrossAttentionConnectorConfig,
    EmbeddingConnectorConfig,
    HybridConnectorConfig,
    LinearProjectorConfig,
    MlpProjectorConfig,
    ProjectorConfig,
    SeeingConnectorConfig,
)
from mmscale.models.connectors.c_abstractor import SQUEEZE
from mmscale.models.connectors.cross_attention import cross_attention_shapes, insertion_layers
from mmscale.models.connectors.unseen_text import looks_ahead, num_absent_rows, with_unseen_text
from mmscale.models.decoder import block_mlps
from mmscale.models.vision import frame_lengths, tile_rows
from mmscale.models.vision_config import PatchesConfig, VisionConfig
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.block import NormPlacement
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.moe import MoeConfig


def cost_per_patch(config: ModelConfig) -> float:
    """Time of one patch relative to one token, from the products that do not grow with length."""
    if config.vision is None or config.connector is None:
        return 0.0
    if isinstance(config.connector, ContrastiveConnectorConfig):
        return _vision_per_patch(config.vision) / _decoder_per_token(config)
    patches, features = _typical_view(config.vision, config.connector.projector)
    view = sum(_projector_products(config, config.connector.projector, patches, 1))
    view += features * _cross_per_feature(config)
    return (_vision_per_patch(config.vision) + view / patches) / _decoder_per_token(config)


def forward_flops(config: ModelConfig, batch: MultimodalBatch) -> int:
    """Operations of one forward over ``batch`` with logits for every token; of a contrastive model without any."""
    return sum(part.forward for part in _parts(config, batch, batch.segments.total, ()))


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a forward and backward.

    Attributes:
        forward: Of the forward pass; logits only for rows that carry loss.
        backward: Of the gradients that the trained components want.
        recomputed: Done a second time by activation checkpointing. They advance nothing, so they are no model's.
    """

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """What the model needs, however it is computed: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is really computed."""
        return self.model + self.recomputed


def training_flops(
    config: ModelConfig, batch: MultimodalBatch, trained: Collection[str], *, recompute: bool = False
) -> TrainingFlops:
    """Operations of one training step over ``batch``; the optimizer has no products worth counting.

    Args:
        config: The model.
        batch: On the host: which rows carry loss is looked up.
        trained: Components that learn.
        recompute: Whether ``checkpoint_units()`` are computed again in the backward pass.
    """
    parts = list(_parts(config, batch, int(batch.loss_weights.count_nonzero()), trained))
    return TrainingFlops(
        sum(part.forward for part in parts),
        sum(part.backward for part in parts),
        sum(part.recomputed for part in parts) if recompute else 0,
    )


@dataclass(frozen=True)
class _Part:
    """Products of like standing.

    Attributes:
        linear: Forward operations of products with a weight.
        weights: Whether those weights learn.
        inputs: Whether a gradient of the inputs is wanted.
        attention: Forward operations of scores and mixing, two products.
        slopes: Gradients that are wanted of their factors, of four: queries, keys, probabilities, values.
        again: What checkpointing computes again. It stops at the last value that the backward pass needs, so the last
            product of a block is often left out.
    """

    linear: int
    weights: bool
    inputs: bool
    attention: int = 0
    slopes: int = 0
    again: int = 0

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    @property
    def backward(self) -> int:
        return self.linear * (self.weights + self.inputs) + self.attention * self.slopes // 2

    @property
    def recomputed(self) -> int:
        return self.again if self.backward else 0


def _parts(config: ModelConfig, batch: MultimodalBatch, rows: int, trained: Collection[str]) -> Iterator[_Part]:
    """Everything that a forward multiplies, with logits of ``rows`` rows."""
    decoder, connector = config.decoder, config.connector
    if not isinstance(connector, SeeingConnectorConfig | ContrastiveConnectorConfig | None):
        raise _uncounted(connector)
    sees = connector is not None and not {"vision", "connector"}.isdisjoint(trained)
    embeds = isinstance(connector, EmbeddingConnectorConfig | HybridConnectorConfig)
    # A gradient flows through the decoder from where learned values enter it: its beginning, or where it first attends.
    early = not {"decoder", "extra_tokens"}.isdisjoint(trained) or (sees and embeds)
    if config.vision is not None and connector is not None:
        yield from _vision_parts(config, batch, trained)
        yield from _projector_parts(config, batch, trained)
    crossing = (
        insertion_layers(decoder.num_layers, connector.every)
        if isinstance(connector, CrossAttentionConnectorConfig | HybridConnectorConfig)
        else []
    )
    queries, keys = batch.segments, batch.segments
    if batch.branched is not None:
        queries, keys = batch.branched.queries, batch.branched.keys
    area = _rectangles(decoder.attention, decoder.hidden_dim, queries, keys)
    tokens, learns, flows = batch.segments.total, "decoder" in trained, early
    for number, mlp in enumerate(block_mlps(decoder)):
        if number in crossing:
            yield from _cross_parts(config, batch, trained, flows)
            flows = early or sees
        linear = tokens * (_attention_per_row(decoder.attention, decoder.hidden_dim) + _mlp(mlp, decoder.hidden_dim))
        tail = tokens * _tail(mlp, decoder.hidden_dim) if decoder.norm_placement is NormPlacement.PRE else 0
        yield _Part(linear, learns, flows, area, 4 * (learns or flows), linear + area - tail)
    if isinstance(connector, ContrastiveConnectorConfig):
        yield _Part(2 * len(batch.pairs) * decoder.hidden_dim * connector.dim, "connector" in trained, flows)
        return
    yield _Part(2 * rows * decoder.hidden_dim * decoder.vocab_size, learns, flows)
    yield _Part(2 * rows * decoder.hidden_dim * decoder.predicted_rows, "extra_tokens" in trained, flows)


def _vision_parts(config: ModelConfig, batch: MultimodalBatch, trained: Collection[str]) -> Iterator[_Part]:
    vision, media = config.vision, batch.media["image"]
    if not isinstance(vision, VisionConfig):
        return
    learns, dim = "vision" in trained, vision.hidden_dim
    queries, keys = _tower_segments(vision, media)
    yield _Part(media.items.total * _patch_embed(vision), learns, False)
    linear = queries.total * (_attention_per_row(vision.attention, dim) + _dense(vision.mlp, dim))
    area = _rectangles(vision.attention, dim, queries, keys)
    tail = queries.total * _tail(vision.mlp, dim) if vision.layer_scale is None else 0
    for _ in range(vision.num_layers):
        yield _Part(linear, learns, learns, area, 4 * learns, linear + area - tail)
    for _ in range(0 if vision.tiles is None else vision.tiles.global_layers):  # A gate needs all of its branch.
        yield _Part(linear, learns, learns, area, 4 * learns, linear + area)


def _tower_segments(vision: VisionConfig, media: MediaBlock) -> tuple[Segments, Segments]:
    """Rows of the tower's stream, and the keys that they see."""
    rows = tile_rows(vision, media)
    if rows is None:
        frames = Segments.from_lengths(frame_lengths(media.grids, extra=int(vision.class_token)))
        return frames, frames
    if isinstance(rows.attended, Segments):
        return rows.attended, rows.attended
    return rows.attended.queries, rows.attended.keys


def _features_in(config: ModelConfig, media: MediaBlock) -> int:
    """Rows that the tower hands on, before they are merged."""
    vision, connector = config.vision, config.connector
    assert vision is not None
    rows = media.items.total + int(vision.class_feature) * sum(time for time, _, _ in media.grids)
    if not isinstance(connector, CrossAttentionConnectorConfig) or not looks_ahead(connector):
        return rows
    return rows + sum(num_absent_rows(media, vision, connector.projector.merge))


def _projector_parts(config: ModelConfig, batch: MultimodalBatch, trained: Collection[str]) -> Iterator[_Part]:
    assert config.vision is not None
    assert config.connector is not None
    media, learns = batch.media["image"], "connector" in trained
    if isinstance(config.connector, ContrastiveConnectorConfig):
        yield _Part(
            2 * len(batch.pairs) * config.vision.feature_dim * config.connector.dim, learns, "vision" in trained
        )
        return
    projector, rows = config.connector.projector, _features_in(config, media)
    first, *later = _projector_products(config, projector, rows, sum(time for time, _, _ in media.grids))
    before = isinstance(config.connector, EmbeddingConnectorConfig) and config.connector.padding
    if isinstance(projector, CAbstractorConfig):
        before |= projector.positions is not None
    elif not isinstance(projector, AttentionPoolConfig):
        before |= projector.norm != "none"
    enters, flows = "vision" in trained or (learns and before), learns or "vision" in trained
    if isinstance(projector, AttentionPoolConfig):
        area = 4 * rows * projector.num_heads * projector.head_dim
        yield _Part(0, False, False, area, 4 * flows)
    yield _Part(first, learns, enters)
    yield from (_Part(flops, learns, flows) for flops in later)


def _cross_parts(config: ModelConfig, batch: MultimodalBatch, trained: Collection[str], flows: bool) -> Iterator[_Part]:
    """One cross-attention block; ``flows``: whether the stream that enters it wants a gradient."""
    assert isinstance(config.connector, CrossAttentionConnectorConfig | HybridConnectorConfig)
    decoder, media, tokens = config.decoder, batch.media["image"], batch.segments.total
    attention, mlp = cross_attention_shapes(config.connector, decoder)
    dim = decoder.hidden_dim
    learns, seen = "connector" in trained, "vision" in trained or "connector" in trained
    query = 2 * tokens * dim * attention.num_heads * attention.resolved_head_dim(dim)
    span_keys = media.span_keys
    if looks_ahead(config.connector):
        assert config.vision is not None
        merge = config.connector.projector.merge
        _, span_keys = with_unseen_text(media, batch.segments, config.vision, merge)
    source = 4 * span_keys.total * dim * attention.kv_heads * attention.resolved_head_dim(dim)
    area = _rectangles(attention, dim, media.span_tokens, span_keys)
    after = query + tokens * _dense(mlp, dim)  # The output projection is as large as the query's.
    yield _Part(query, learns, learns or flows, again=query)  # The norm before it learns with it.
    yield _Part(source, learns, seen, again=source)
    asks = learns or flows
    slopes = asks + 2 * seen + (asks or seen)
    yield _Part(after, learns, asks or seen, area, slopes, after + area)


def _tail(mlp: DenseMlpConfig | MoeConfig, dim: int) -> int:
    """The last product of a block's feed-forward, a row, where nothing behind it is kept for the backward pass."""
    if isinstance(mlp, DenseMlpConfig):
        return 2 * dim * mlp.hidden_dim
    return 2 * dim * mlp.shared_dim if mlp.shared_dim and not mlp.shared_gate else 0


def _typical_view(vision: VisionConfig | PatchesConfig, projector: ProjectorConfig) -> tuple[int, int]:
    """Patches and features of a view of the tower's one size, or else of the least that the projector takes.

    What pools views of any size is so charged at its dearest.
    """
    grid = vision.fixed_grid
    if isinstance(projector, CAbstractorConfig):
        return (math.prod(grid) if grid else projector.side**2), projector.side**2
    return projector.merge**2, 1


def _attention_per_row(config: AttentionConfig, dim: int) -> int:
    """The four projections of one row of self-attention."""
    return 4 * dim * config.resolved_head_dim(dim) * (config.num_heads + config.kv_heads)


def _rectangles(config: AttentionConfig, dim: int, queries: Segments, keys: Segments) -> int:
    """Scores and mixing, ``4 * Lq * Lk * H * K`` per segment."""
    area = int(np.dot(np.diff(queries.bounds).astype(np.int64), np.diff(keys.bounds).astype(np.int64)))
    return 4 * area * config.num_heads * config.resolved_head_dim(dim)


def _dense(config: DenseMlpConfig, dim: int) -> int:
    return 2 * dim * config.hidden_dim * (3 if config.gated else 2)


def _experts(config: MoeConfig, dim: int) -> int:
    routed = 6 * dim * config.expert_dim * config.experts_per_token
    shared = 6 * dim * config.shared_dim + (2 * dim if config.shared_gate else 0)
    return routed + shared + 2 * dim * config.num_experts


def _mlp(config: DenseMlpConfig | MoeConfig, dim: int) -> int:
    if isinstance(config, DenseMlpConfig):
        return _dense(config, dim)
    if isinstance(config, MoeConfig):
        return _experts(config, dim)
    raise _uncounted(config)


def _decoder_per_token(config: ModelConfig) -> int:
    """Projections, feed-forwards and head, if there is one, of one token, cross-attention's own side included.

    Extra rows of the head are left out: a few new tokens must not change which documents share a pack.
    """
    decoder = config.decoder
    dim = decoder.hidden_dim
    total = decoder.num_layers * _attention_per_row(decoder.attention, dim)
    total += sum(_mlp(mlp, dim) for mlp in block_mlps(decoder))
    if not isinstance(config.connector, ContrastiveConnectorConfig):
        total += 2 * dim * decoder.vocab_size
    if isinstance(config.connector, CrossAttentionConnectorConfig | HybridConnectorConfig):
        attention, mlp = cross_attention_shapes(config.connector, decoder)
        blocks = len(insertion_layers(decoder.num_layers, config.connector.every))
        query_side = 4 * dim * attention.num_heads * attention.resolved_head_dim(dim)
        total += blocks * (query_side + _dense(mlp, dim))
    return total


def _cross_per_feature(config: ModelConfig) -> int:
    """Keys and values of one attended feature, over all cross-attention blocks."""
    decoder: DecoderConfig = config.decoder
    if not isinstance(config.connector, CrossAttentionConnectorConfig | HybridConnectorConfig):
        return 0
    attention, _ = cross_attention_shapes(config.connector, decoder)
    blocks = len(insertion_layers(decoder.num_layers, config.connector.every))
    return blocks * 4 * decoder.hidden_dim * attention.kv_heads * attention.resolved_head_dim(decoder.hidden_dim)


def _patch_embed(config: VisionConfig) -> int:
    return 2 * config.channels * config.patch_size**2 * config.hidden_dim


def _vision_per_patch(config: VisionConfig | PatchesConfig) -> int:
    if isinstance(config, PatchesConfig):
        return 0
    if not isinstance(config, VisionConfig):
        raise _uncounted(config)
    block = _attention_per_row(config.attention, config.hidden_dim) + _dense(config.mlp, config.hidden_dim)
    num_global = 0 if config.tiles is None else config.tiles.global_layers
    return _patch_embed(config) + (config.num_layers + num_global) * block


def _projector_products(config: ModelConfig, projector: ProjectorConfig, patches: int, frames: int) -> list[int]:
    """Operations of the projector over so many patches of so many frames: of its first product, then of the others."""
    assert config.vision is not None
    dim = config.decoder.hidden_dim
    if isinstance(projector, CAbstractorConfig):
        return _abstractor_products(projector, config.vision.feature_dim, dim, patches, frames)
    square = projector.merge**2
    width, features = config.vision.feature_dim * square, patches // square
    if isinstance(projector, AttentionPoolConfig):
        pooled = projector.num_heads * projector.head_dim
        mlp = 2 * projector.mlp.hidden_dim
        asked = 2 * config.vision.feature_dim * pooled * (1 + 2 * square)
        return [features * each for each in (asked, 2 * pooled**2, mlp * pooled * (1 + projector.mlp.gated), mlp * dim)]
    if isinstance(projector, MlpProjectorConfig):
        hidden = projector.hidden_dim or dim
        return [2 * features * width * hidden, 2 * features * hidden * dim]
    if isinstance(projector, LinearProjectorConfig):
        return [2 * features * width * dim]
    raise _uncounted(projector)


def _uncounted(part: object) -> TypeError:
    """The error for a kind of block that has no formula here: any other formula would count it wrong in silence."""
    return TypeError(f"{type(part).__name__}: no count of its operations is known; add one to {__name__}")


def _abstractor_products(config: CAbstractorConfig, width: int, dim: int, patches: int, frames: int) -> list[int]:
    inner, features = config.hidden_dim, frames * config.side**2
    squeezes = round(width / SQUEEZE) + (2 * config.depth - 1) * round(inner / SQUEEZE)
    blocks = 2 * inner * inner + 18 * inner  # The last product and the convolution of each.
    later = config.depth * patches * blocks + config.depth * features * (blocks + 2 * inner * inner)
    later += (config.depth - 1) * patches * 2 * inner * inner + 4 * frames * inner * squeezes
    shortcut = 1 if width == inner else 2  # Both take the tower's rows.
    return [2 * shortcut * patches * width * inner, later, 2 * features * (inner + dim) * dim]
