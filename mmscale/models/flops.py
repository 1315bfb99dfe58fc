"""Floating-point operations by formula: what a forward costs, and what a patch costs beside a token.

A multiply-add counts as two. Matrix products alone count, as in torch's ``FlopCounterMode``; attention counts the full
rectangle of queries and keys of a segment, causal or not, so that figures compare with published ones.

Source: Kaplan et al. 2020 (arXiv 2001.08361), table 1; PaLM (arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.batch import MultimodalBatch, Segments
from mmscale.models.config import (
    DecoderConfig,
    EmbeddingConnectorConfig,
    MlpProjectorConfig,
    ModelConfig,
    VisionConfig,
)
from mmscale.models.connectors.cross_attention import cross_attention_shapes, insertion_layers
from mmscale.models.decoder import block_mlps
from mmscale.models.vision import frame_lengths
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.moe import MoeConfig


def cost_per_patch(config: ModelConfig) -> float:
    """Time of one patch relative to one token, from the products that do not grow with length."""
    if config.vision is None or config.connector is None:
        return 0.0
    patch = (
        _vision_per_patch(config.vision) + _projector_per_patch(config) + _cross_per_feature(config) / _merge(config)
    )
    return patch / _decoder_per_token(config)


def forward_flops(config: ModelConfig, batch: MultimodalBatch) -> int:
    """Operations of one forward over ``batch`` with logits for every token."""
    decoder = config.decoder
    total = batch.segments.total * _decoder_per_token(config)
    queries, keys = batch.segments, batch.segments
    if batch.branched is not None:
        queries, keys = batch.branched.queries, batch.branched.keys
    total += decoder.num_layers * _rectangles(decoder.attention, decoder.hidden_dim, queries, keys)
    if config.vision is None or config.connector is None:
        return total
    vision, media = config.vision, batch.media["image"]
    frames = Segments.from_lengths(frame_lengths(media.grids, extra=int(vision.class_token)))
    patches = media.items.total
    block = _attention_per_row(vision.attention, vision.hidden_dim) + _dense(vision.mlp, vision.hidden_dim)
    total += patches * _patch_embed(vision) + frames.total * vision.num_layers * block
    total += vision.num_layers * _rectangles(vision.attention, vision.hidden_dim, frames, frames)
    total += patches * _projector_per_patch(config)
    if not isinstance(config.connector, EmbeddingConnectorConfig):
        attention, _ = cross_attention_shapes(config.connector, decoder)
        blocks = len(insertion_layers(decoder.num_layers, config.connector.every))
        total += media.span_keys.total * _cross_per_feature(config)
        total += blocks * _rectangles(attention, decoder.hidden_dim, media.span_tokens, media.span_keys)
    return total


def _merge(config: ModelConfig) -> int:
    return 1 if config.connector is None else config.connector.projector.merge**2


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
    return _dense(config, dim) if isinstance(config, DenseMlpConfig) else _experts(config, dim)


def _decoder_per_token(config: ModelConfig) -> int:
    """Projections, feed-forwards and head of one token, cross-attention's own side included."""
    decoder = config.decoder
    dim = decoder.hidden_dim
    total = decoder.num_layers * _attention_per_row(decoder.attention, dim)
    total += sum(_mlp(mlp, dim) for mlp in block_mlps(decoder)) + 2 * dim * decoder.vocab_size
    if config.connector is not None and not isinstance(config.connector, EmbeddingConnectorConfig):
        attention, mlp = cross_attention_shapes(config.connector, decoder)
        blocks = len(insertion_layers(decoder.num_layers, config.connector.every))
        query_side = 4 * dim * attention.num_heads * attention.resolved_head_dim(dim)
        total += blocks * (query_side + _dense(mlp, dim))
    return total


def _cross_per_feature(config: ModelConfig) -> int:
    """Keys and values of one attended feature, over all cross-attention blocks."""
    decoder: DecoderConfig = config.decoder
    if config.connector is None or isinstance(config.connector, EmbeddingConnectorConfig):
        return 0
    attention, _ = cross_attention_shapes(config.connector, decoder)
    blocks = len(insertion_layers(decoder.num_layers, config.connector.every))
    return blocks * 4 * decoder.hidden_dim * attention.kv_heads * attention.resolved_head_dim(decoder.hidden_dim)


def _patch_embed(config: VisionConfig) -> int:
    return 2 * config.channels * config.patch_size**2 * config.hidden_dim


def _vision_per_patch(config: VisionConfig) -> int:
    block = _attention_per_row(config.attention, config.hidden_dim) + _dense(config.mlp, config.hidden_dim)
    return _patch_embed(config) + config.num_layers * block


def _projector_per_patch(config: ModelConfig) -> int:
    """Operations per patch; features are fewer by ``merge**2``, and as much wider."""
    assert config.vision is not None
    assert config.connector is not None
    projector, dim = config.connector.projector, config.decoder.hidden_dim
    if isinstance(projector, MlpProjectorConfig):
        hidden = projector.hidden_dim or dim
        return 2 * config.vision.feature_dim * hidden + 2 * hidden * dim // _merge(config)
    return 2 * config.vision.feature_dim * dim
