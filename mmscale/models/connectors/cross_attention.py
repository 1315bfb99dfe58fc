"""Gated cross-attention blocks between decoder blocks, and the two connectors that use them.

features --projector--> rows, with tags --attended_index--> attended rows --k, v per block--> cross-attention of spans
                          \\--gather_index--> token slots (hybrid only)

A span is a run of consecutive tokens that attend to the same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.media_spec import Placement
from mmscale.models.connectors.connector import Connector, FeatureConnectorBase
from mmscale.models.connectors.embedding import write_features
from mmscale.models.connectors.lookahead import features_per_crop, lookahead_keys
from mmscale.models.connectors.projector import LinearProjectorConfig
from mmscale.models.decoder import CrossAttentionHooks, DecoderConfig
from mmscale.models.kv_cache import CrossCache, KVCache
from mmscale.models.projector_config import ProjectorConfig
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend, num_pairs
from mmscale.nn.block import AttentionConfig, CrossAttention, DenseMlpConfig, Mlp, QkNorm, build_norm
from mmscale.nn.dropout import Dropout, SubLayer
from mmscale.nn.flops import Product, attention_product, linear_product
from mmscale.nn.host import to_device
from mmscale.nn.init import set_init_scale
from mmscale.nn.moe import MoeConfig
from mmscale.nn.sizes import Layers, ShrunkTo


def cross_attention_layers(num_layers: int, every: int) -> list[int]:
    """Return the decoder blocks with a cross-attention block before them, 0-based: every - 1, 2 * every - 1, ..."""
    return list(range(every - 1, num_layers, every))


class CrossAttentionConnectorBase(FeatureConnectorBase):
    """Base class of connectors with cross-attention blocks."""

    training_fields: ClassVar[tuple[str, ...]] = ("gate_init",)
    projector: ProjectorConfig = LinearProjectorConfig()
    """From tower features to the decoder's width."""
    every: Annotated[Layers, ShrunkTo(2, counts_blocks=True)] = 4
    """Put a cross-attention block before every n-th decoder block: n-1, 2n-1, ... (0-based). At most the number of
    decoder blocks."""
    attention: AttentionConfig | None = None
    """Heads of the cross-attention. Null: those of the decoder, with ``qk_norm: head``."""
    mlp: DenseMlpConfig | None = None
    """Feed-forward of the cross-attention blocks. Null: that of the decoder or, if the decoder has experts,
    ``decoder.mlp.dense``, which must then be set."""
    gate_init: float = 0.0
    """Initial value of the tanh gates on both branches. 0 (as published): the blocks have no effect at first."""

    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> CrossAttentionConnector:
        return CrossAttentionConnector(self, vision, decoder, backend)

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        if self.every > decoder.num_layers:
            raise ValueError(
                f"connector.every={self.every}: gives a decoder of {decoder.num_layers} blocks no cross-attention; "
                f"must be at most {decoder.num_layers}"
            )
        if self.attention is not None:
            try:
                self.attention.resolved_head_dim(decoder.hidden_dim)
            except ValueError as error:
                raise ValueError(f"connector.attention.{error}") from None
        if self.mlp is None and isinstance(decoder.mlp, MoeConfig) and decoder.mlp.dense is None:
            raise ValueError("connector.mlp: set it; a decoder with experts in every block has no dense mlp to copy")
        super().check(vision, decoder)

    def shapes(self, decoder: DecoderConfig) -> tuple[AttentionConfig, DenseMlpConfig]:
        """Return attention and feed-forward of the blocks, with the decoder's in place of null values."""
        attention = self.attention or decoder.attention.model_copy(update={"qk_norm": QkNorm.HEAD})
        mlp = self.mlp or (decoder.mlp.dense if isinstance(decoder.mlp, MoeConfig) else decoder.mlp)
        assert mlp is not None, "checked"
        return attention, mlp

    def block_layers(self, decoder: DecoderConfig) -> list[int]:
        return cross_attention_layers(decoder.num_layers, self.every)

    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        media = batch.media["image"]
        span_keys = media.span_keys
        if self.looks_ahead:
            _, span_keys = lookahead_keys(media, batch.segments, vision, self.projector.merge)
        return {
            **super().counts(vision, batch),
            "attended_rows": span_keys.total,
            "cross_pairs": num_pairs(media.span_tokens, span_keys),
        }

    def block_products(self, decoder: DecoderConfig, trained: Collection[str], flows: bool) -> list[Product]:
        attention, mlp = self.shapes(decoder)
        dim, head_dim = decoder.hidden_dim, attention.resolved_head_dim(decoder.hidden_dim)
        learns, feature_gradient = "connector" in trained, "vision" in trained or "connector" in trained
        query = 2 * dim * attention.num_heads * head_dim
        source = 4 * dim * attention.kv_heads * head_dim
        pair = attention.flops_per_pair(dim)
        after = query + mlp.flops_per_row(dim)  # The output projection is as large as the query projection.
        query_gradient = learns or flows  # A trained connector also trains the norm before the query projection.
        gradients = query_gradient + 2 * feature_gradient + (query_gradient or feature_gradient)
        return [
            linear_product("token_rows", query, weights=learns, inputs=query_gradient, again=query),
            linear_product("attended_rows", source, weights=learns, inputs=feature_gradient, again=source),
            linear_product("token_rows", after, weights=learns, inputs=query_gradient or feature_gradient, again=after),
            attention_product("cross_pairs", pair, gradients=gradients, again=pair),
        ]


class UnseenText(str, Enum):
    """Behaviour of cross-attention blocks for text before the first image of its document."""

    SILENT = "silent"
    """Neither attention nor feed-forward, as in the reference code of Llama 3.2 Vision."""
    LOOKS_AHEAD = "looks_ahead"
    """Attention to all later images of the document, absent tiles included, but no feed-forward, as in transformers."""


class CrossAttentionConnectorConfig(CrossAttentionConnectorBase):
    """Gated cross-attention blocks attend to the features of all crops (Llama 3.2 Vision, NVLM-X)."""

    placement: ClassVar[Placement] = Placement.CROSS_ATTENTION
    kind: Literal["cross_attention"] = "cross_attention"
    unseen_text: UnseenText = UnseenText.SILENT
    """Cross-attention of text before the first image of its document. ``silent``: none. ``looks_ahead``: to all images
    of the document, as transformers computes it."""

    @property
    def looks_ahead(self) -> bool:
        return self.unseen_text is UnseenText.LOOKS_AHEAD

    @property
    def accepts_class_feature(self) -> bool:
        return self.projector.accepts_class_feature


class HybridConnectorConfig(CrossAttentionConnectorBase):
    """The overview's features replace placeholder tokens; cross-attention blocks attend to the tiles (NVLM-H)."""

    placement: ClassVar[Placement] = Placement.HYBRID
    kind: Literal["hybrid"] = "hybrid"

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        super().check(vision, decoder)
        if vision.tiles is not None:
            raise ValueError(
                "vision.tiles: takes only tiles, but connector.kind=hybrid needs an overview of the whole image; set "
                "vision.tiles=null"
            )


def rows_with_keys(span_tokens: Segments, span_keys: Segments) -> Bool[Tensor, " T"]:
    """Return whether each token's span attends to any rows. Does not synchronise with the device."""
    has_keys = span_keys.cu.diff() > 0
    return has_keys.repeat_interleave(span_tokens.cu.diff(), output_size=span_tokens.total)


class CrossAttentionBlock(nn.Module):
    """``x += tanh(g1) * attend(norm(x)); x += tanh(g2) * mlp(norm(x))``; no change to rows that attend to nothing.

    Source: Flamingo (arXiv 2204.14198, section 2.2) for the gates; Llama 3 (arXiv 2407.21783, section 7) and its
    reference code for norms on q and k heads and for masking both branches.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        attention: AttentionConfig,
        mlp: DenseMlpConfig,
        gate_init: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        dim = decoder.hidden_dim
        self.input_layernorm = build_norm(decoder.norm, dim)
        self.cross_attn = CrossAttention(dim, dim, attention, decoder.norm, backend)
        self.cross_attn_attn_gate = nn.Parameter(torch.full((1,), gate_init))
        self.post_attention_layernorm = build_norm(decoder.norm, dim)
        self.mlp = Mlp(dim, mlp)
        self.cross_attn_mlp_gate = nn.Parameter(torch.full((1,), gate_init))
        self.constant_init = {"cross_attn_attn_gate": gate_init, "cross_attn_mlp_gate": gate_init}

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        source: Float[Tensor, "A D"] | CrossCache,
        span_tokens: Segments,
        span_keys: Segments,
        visible: Bool[Tensor, " T"],
        dropout: Dropout | None = None,
        before_image: Bool[Tensor, " T"] | None = None,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "A G K"], Float[Tensor, "A G K"]]:
        """Return the residual stream, and the keys and values that were used, for a cache.

        Args:
            hidden: Residual stream.
            source: The attended rows, or their cached keys and values.
            span_tokens: Partition of the tokens into spans.
            span_keys: Partition of the attended rows, one segment per span.
            visible: Tokens that attend to any rows. The block does not change the others.
            dropout: Masks of this block; None for none.
            before_image: Tokens without feed-forward (``unseen_text: looks_ahead``); None for none.
        """
        if isinstance(source, CrossCache):
            keys, values = source.keys, source.values
        else:
            keys, values = self.cross_attn.keys_and_values(source)
        mask = visible.unsqueeze(1).to(hidden.dtype)
        attended = self.cross_attn(self.input_layernorm(hidden), keys, values, span_tokens, span_keys)
        branch = self.cross_attn_attn_gate.tanh() * mask * attended
        hidden = hidden + (branch if dropout is None else dropout(branch, SubLayer.ATTENTION))
        changed = self.mlp(self.post_attention_layernorm(hidden))
        if before_image is not None:
            mask = mask * ~before_image.unsqueeze(1)
        branch = self.cross_attn_mlp_gate.tanh() * mask * changed
        return hidden + (branch if dropout is None else dropout(branch, SubLayer.FEED_FORWARD)), keys, values


class CrossAttentionConnector(Connector):
    """Cross-attention to the features of crops; with ``hybrid``, features of overviews also replace placeholder tokens.

    Source: Llama 3 (section 7); NVLM (arXiv 2409.11402, section 4) for the hybrid.
    """

    def __init__(
        self,
        config: CrossAttentionConnectorBase,
        vision: AnyVisionConfig,
        decoder: DecoderConfig,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.looks_ahead, self.merge = config.looks_ahead, config.projector.merge
        self.projector = config.projector.build(vision.feature_dim, decoder.hidden_dim)
        attention, mlp = config.shapes(decoder)
        layers = config.block_layers(decoder)
        self.blocks = nn.ModuleDict(
            {str(layer): CrossAttentionBlock(decoder, attention, mlp, config.gate_init, backend) for layer in layers}
        )
        self.embeds = config.placement is Placement.HYBRID
        set_init_scale(self.blocks, decoder.num_layers + len(layers), decoder.init_std)

    def connect(
        self,
        hidden: Tensor,
        features: Tensor,
        tags: Tensor,
        media: MediaBlock,
        segments: Segments,
        cache: KVCache | None,
    ) -> tuple[Tensor, CrossAttentionHooks]:
        """See ``Connector``. Running the returned cross-attention fills ``cache.cross`` if there is a cache."""
        rows = self.projector(features, media.grids)
        if self.embeds:
            hidden = write_features(hidden, rows, media)
        absent, before_image = rows[:0], None
        if self.looks_ahead:
            before_image = ~rows_with_keys(media.span_tokens, media.span_keys)
            rows, absent = rows.tensor_split([sum(features_per_crop(media, self.vision, self.merge))])
            keys, span_keys = lookahead_keys(media, segments, self.vision, self.merge)
            media = replace(media, attended_index=keys, span_keys=span_keys)
        # Leave out empty tensors. Otherwise empty tags of a trained decoder would make the keys and values of a frozen
        # connector require gradients.
        further = [each.to(rows.dtype) for each in (tags, absent) if len(each)]
        attended = torch.cat([rows, *further]).index_select(0, media.attended_index)
        visible = rows_with_keys(media.span_tokens, media.span_keys)
        last = None if cache is None else _last_span_keys(segments, media, hidden.device)
        blocks = {int(layer): block for layer, block in self.blocks.items()}
        return hidden, PromptCrossAttention(
            blocks, attended, media.span_tokens, media.span_keys, visible, before_image, cache, last
        )

    def resume(self, cache: KVCache, segments: Segments) -> CrossAttentionHooks:
        """Return the cross-attention of new rows of cached sequences, over the cached keys and values."""
        return CachedCrossAttention({int(layer): block for layer, block in self.blocks.items()}, segments, cache.cross)

    def blocks_to_recompute(self) -> list[nn.Module]:
        return list(self.blocks.values())


@dataclass(frozen=True)
class PromptCrossAttention:
    """Cross-attention of whole documents, in training or for prompts. Implements ``CrossAttentionHooks``.

    Attributes:
        layers: Cross-attention blocks, by the number of the decoder block after each.
        source: The attended rows.
        span_tokens: Partition of the tokens into spans.
        span_keys: Partition of the attended rows, one segment per span.
        visible: Tokens that attend to any rows.
        before_image: Tokens without feed-forward; None for none.
        cache: Receives the keys and values of every block; None in training.
        last: With a cache, the indices of the attended rows of each sequence's last span, and their partition by
            sequence. New tokens attend to these rows.
    """

    layers: Mapping[int, nn.Module]
    source: Float[Tensor, "A D"]
    span_tokens: Segments
    span_keys: Segments
    visible: Bool[Tensor, " T"]
    before_image: Bool[Tensor, " T"] | None
    cache: KVCache | None
    last: tuple[Tensor, Segments] | None

    def before_block(self, layer: int, hidden: Tensor, dropout: Dropout | None) -> Tensor:
        """See ``CrossAttentionHooks``. With a cache, writes the block's keys and values into it."""
        hidden, keys, values = self.layers[layer](
            hidden, self.source, self.span_tokens, self.span_keys, self.visible, dropout, self.before_image
        )
        if self.cache is not None and self.last is not None:
            index, pieces = self.last
            self.cache.cross[layer] = CrossCache(keys.index_select(0, index), values.index_select(0, index), pieces)
        return hidden


@dataclass(frozen=True)
class CachedCrossAttention:
    """Cross-attention of new rows during generation, over cached keys and values. Implements ``CrossAttentionHooks``.

    Attributes:
        layers: Cross-attention blocks, by the number of the decoder block after each.
        segments: Partition of the new rows by sequence.
        stored: Cached keys and values of each block, by the same number.
    """

    layers: Mapping[int, nn.Module]
    segments: Segments
    stored: Mapping[int, CrossCache]

    def before_block(self, layer: int, hidden: Tensor, dropout: Dropout | None) -> Tensor:
        """See ``CrossAttentionHooks``."""
        stored = self.stored[layer]
        visible = rows_with_keys(self.segments, stored.segments)
        changed: Tensor = self.layers[layer](hidden, stored, self.segments, stored.segments, visible, dropout)[0]
        return changed


def _last_span_keys(segments: Segments, media: MediaBlock, device: torch.device) -> tuple[Tensor, Segments]:
    """Return the indices of the attended rows of each sequence's last span, and their partition by sequence."""
    ends = np.array(media.span_tokens.bounds[1:])
    pieces = []
    for start, end in zip(segments.bounds, segments.bounds[1:], strict=False):
        span = int(np.searchsorted(ends, end))  # The first span to reach the end of the sequence is its last.
        inside = end > start and span < len(ends)
        pieces.append(np.arange(*media.span_keys.bounds[span : span + 2]) if inside else np.arange(0))
    parts = Segments.from_lengths([len(piece) for piece in pieces])
    return to_device(np.concatenate(pieces), device), Segments(to_device(parts.cu, device), parts.bounds)
