"""Gated cross-attention blocks between decoder blocks, and the two connectors that use them.

features --projector--> rows, and tags --keys--> attended rows --k, v per block--> cross-attention of the text spans
                          \\--source--> token slots (hybrid only)
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
from mmscale.models.connectors.projector import LinearProjectorConfig
from mmscale.models.connectors.unseen_text import rows_of_views, with_unseen_text
from mmscale.models.decoder import CrossAttended, DecoderConfig
from mmscale.models.kv_cache import CrossCache, KVCache
from mmscale.models.projector_config import ProjectorConfig
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend, num_pairs
from mmscale.nn.block import AttentionConfig, CrossAttention, DenseMlpConfig, Mlp, QkNorm, build_norm
from mmscale.nn.dropout import Branch, Dropout
from mmscale.nn.flops import Product, attention_of, linear
from mmscale.nn.init import set_init_scale
from mmscale.nn.moe import MoeConfig
from mmscale.nn.sizes import Layers, ShrunkTo


def insertion_layers(num_layers: int, every: int) -> list[int]:
    """0-based decoder blocks that have a cross-attention block before them: ``every - 1, 2 every - 1, ...``."""
    return list(range(every - 1, num_layers, every))


class AttendedConnectorBase(FeatureConnectorBase):
    """Cross-attention blocks of the connector read the features."""

    training_fields: ClassVar[tuple[str, ...]] = ("gate_init",)
    projector: ProjectorConfig = LinearProjectorConfig()
    """From tower features to the decoder's width."""
    every: Annotated[Layers, ShrunkTo(2)] = 4
    """A cross-attention block stands before decoder blocks n-1, 2n-1, ... (0-based)."""
    attention: AttentionConfig | None = None
    """Heads of the cross-attention; null: as the decoder's."""
    mlp: DenseMlpConfig | None = None
    """Feed-forward of the cross-attention blocks; null: as the decoder's, which must be dense then."""
    gate_init: float = 0.0
    """Start of the tanh gates on both branches; 0 as published: the decoder is unchanged at first."""

    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> CrossAttentionConnector:
        return CrossAttentionConnector(self, vision, decoder, backend)

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        if self.every > decoder.num_layers:
            raise ValueError(f"connector.every={self.every}: a decoder of {decoder.num_layers} blocks gets none")
        if self.attention is not None:
            try:
                self.attention.resolved_head_dim(decoder.hidden_dim)
            except ValueError as error:
                raise ValueError(f"connector.attention.{error}") from None
        if self.mlp is None and isinstance(decoder.mlp, MoeConfig) and decoder.mlp.dense is None:
            raise ValueError("connector.mlp: set it; a decoder with experts in every block has no dense one to copy")
        super().check(vision, decoder)

    def shapes(self, decoder: DecoderConfig) -> tuple[AttentionConfig, DenseMlpConfig]:
        """Attention and feed-forward of the blocks. The decoder gives unset values, with norms on q and k heads."""
        attention = self.attention or decoder.attention.model_copy(update={"qk_norm": QkNorm.HEAD})
        mlp = self.mlp or (decoder.mlp.dense if isinstance(decoder.mlp, MoeConfig) else decoder.mlp)
        assert mlp is not None, "checked"
        return attention, mlp

    def block_layers(self, decoder: DecoderConfig) -> list[int]:
        return insertion_layers(decoder.num_layers, self.every)

    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        media = batch.media["image"]
        span_keys = media.span_keys
        if self.looks_ahead:
            _, span_keys = with_unseen_text(media, batch.segments, vision, self.projector.merge)
        return {
            **super().counts(vision, batch),
            "attended_rows": span_keys.total,
            "cross_pairs": num_pairs(media.span_tokens, span_keys),
        }

    def block_products(self, decoder: DecoderConfig, trained: Collection[str], flows: bool) -> list[Product]:
        attention, mlp = self.shapes(decoder)
        dim, head_dim = decoder.hidden_dim, attention.resolved_head_dim(decoder.hidden_dim)
        learns, seen = "connector" in trained, "vision" in trained or "connector" in trained
        query = 2 * dim * attention.num_heads * head_dim
        source = 4 * dim * attention.kv_heads * head_dim
        pair = attention.flops_per_pair(dim)
        after = query + mlp.flops_per_row(dim)  # The output projection is as large as the query's.
        asks = learns or flows
        gradients = asks + 2 * seen + (asks or seen)
        return [
            linear("token_rows", query, weights=learns, inputs=asks, again=query),  # The norm before it learns with it.
            linear("attended_rows", source, weights=learns, inputs=seen, again=source),
            linear("token_rows", after, weights=learns, inputs=asks or seen, again=after),
            attention_of("cross_pairs", pair, gradients=gradients, again=pair),
        ]


class UnseenText(str, Enum):
    """What cross-attention does for text before the first image of its document."""

    SILENT = "silent"
    """Nothing, neither attention nor feed-forward: the reference code of Llama 3.2 Vision."""
    LOOKS_AHEAD = "looks_ahead"
    """It attends to all images of the document, those that come later and absent tiles included; no feed-forward:
    transformers."""


class CrossAttentionConnectorConfig(AttendedConnectorBase):
    """Every view is attended by gated cross-attention blocks (Llama 3.2 Vision, NVLM-X)."""

    placement: ClassVar[Placement] = Placement.CROSS_ATTENTION
    kind: Literal["cross_attention"] = "cross_attention"
    unseen_text: UnseenText = UnseenText.SILENT
    """Text before the first image: ``silent``, or ``looks_ahead`` to train what transformers computes."""

    @property
    def looks_ahead(self) -> bool:
        return self.unseen_text is UnseenText.LOOKS_AHEAD

    @property
    def takes_class_feature(self) -> bool:
        return self.projector.merge == 1


class HybridConnectorConfig(AttendedConnectorBase):
    """The overview takes token places, tiles are attended (NVLM-H)."""

    placement: ClassVar[Placement] = Placement.HYBRID
    kind: Literal["hybrid"] = "hybrid"

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        super().check(vision, decoder)
        if vision.tiles is not None:
            raise ValueError(
                "vision.tiles: knows tiles alone, but connector.kind=hybrid needs a view of the whole image"
            )


def rows_with_keys(span_tokens: Segments, span_keys: Segments) -> Bool[Tensor, " T"]:
    """Whether each token's span has anything to attend; computed on the device, without waiting for it."""
    seen = span_keys.cu.diff() > 0
    return seen.repeat_interleave(span_tokens.cu.diff(), output_size=span_tokens.total)


class CrossAttentionBlock(nn.Module):
    """``x += tanh(g1) * attend(norm(x)); x += tanh(g2) * mlp(norm(x))``, nothing where no image is visible.

    Source: Flamingo (arXiv 2204.14198, section 2.2) for the gates; Llama 3 (arXiv 2407.21783, section 7.1) and its
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
        unseen: Bool[Tensor, " T"] | None = None,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "A G K"], Float[Tensor, "A G K"]]:
        """Returns the stream, and the keys and values used, for a cache.

        ``visible`` rows have something to attend; of these the ``unseen`` ones get no feed-forward.
        """
        if isinstance(source, CrossCache):
            keys, values = source.keys, source.values
        else:
            keys, values = self.cross_attn.keys_and_values(source)
        mask = visible.unsqueeze(1).to(hidden.dtype)
        attended = self.cross_attn(self.input_layernorm(hidden), keys, values, span_tokens, span_keys)
        branch = self.cross_attn_attn_gate.tanh() * mask * attended
        hidden = hidden + (branch if dropout is None else dropout(branch, Branch.ATTENTION))
        changed = self.mlp(self.post_attention_layernorm(hidden))
        if unseen is not None:
            mask = mask * ~unseen.unsqueeze(1)
        branch = self.cross_attn_mlp_gate.tanh() * mask * changed
        return hidden + (branch if dropout is None else dropout(branch, Branch.FEED_FORWARD)), keys, values


class CrossAttentionConnector(Connector):
    """Views are attended; with ``hybrid`` the embedded ones (overviews) also take token slots.

    Source: Llama 3 (section 7.1); NVLM (arXiv 2409.11402, section 4.2) for the hybrid.
    """

    def __init__(
        self,
        config: AttendedConnectorBase,
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
    ) -> tuple[Tensor, CrossAttended]:
        """The decoder's input and cross-attention, which fills ``cache.cross`` if there is a cache."""
        rows = self.projector(features, media.grids)
        if self.embeds:
            hidden = write_features(hidden, rows, media)
        absent, unseen = rows[:0], None
        if self.looks_ahead:
            unseen = ~rows_with_keys(media.span_tokens, media.span_keys)
            rows, absent = rows.tensor_split([sum(rows_of_views(media, self.vision, self.merge))])
            keys, span_keys = with_unseen_text(media, segments, self.vision, self.merge)
            media = replace(media, keys=keys, span_keys=span_keys)
        # No tags, no gradient: else keys and values of a frozen connector would want theirs where the decoder learns.
        further = [each.to(rows.dtype) for each in (tags, absent) if len(each)]
        attended = torch.cat([rows, *further]).index_select(0, media.keys)
        visible = rows_with_keys(media.span_tokens, media.span_keys)
        last = None if cache is None else _last_span_keys(segments, media, hidden.device)
        blocks = {int(layer): block for layer, block in self.blocks.items()}
        return hidden, AttendedRows(blocks, attended, media.span_tokens, media.span_keys, visible, unseen, cache, last)

    def resume(self, cache: KVCache, segments: Segments) -> CrossAttended:
        """Cross-attention of rows that continue cached sequences."""
        return CachedRows({int(layer): block for layer, block in self.blocks.items()}, segments, cache.cross)

    def blocks_to_recompute(self) -> list[nn.Module]:
        return list(self.blocks.values())


@dataclass(frozen=True)
class AttendedRows:
    """The rows that whole documents attend: a ``CrossAttended``.

    Attributes:
        layers: The block before each decoder block, by its number.
        source: The attended rows.
        span_tokens: Consecutive spans of tokens.
        span_keys: The rows that each span attends.
        visible: Tokens that attend anything.
        unseen: Tokens that get no feed-forward; None for none.
        cache: Receives keys and values of every block; None keeps none.
        last: With a cache: index of the rows that each sequence goes on to attend, and their numbers.
    """

    layers: Mapping[int, nn.Module]
    source: Float[Tensor, "A D"]
    span_tokens: Segments
    span_keys: Segments
    visible: Bool[Tensor, " T"]
    unseen: Bool[Tensor, " T"] | None
    cache: KVCache | None
    last: tuple[Tensor, Segments] | None

    def before_block(self, layer: int, hidden: Tensor, dropout: Dropout | None) -> Tensor:
        """See ``CrossAttended``. Writes the block's keys and values into the cache."""
        hidden, keys, values = self.layers[layer](
            hidden, self.source, self.span_tokens, self.span_keys, self.visible, dropout, self.unseen
        )
        if self.cache is not None and self.last is not None:
            index, pieces = self.last
            self.cache.cross[layer] = CrossCache(keys.index_select(0, index), values.index_select(0, index), pieces)
        return hidden


@dataclass(frozen=True)
class CachedRows:
    """Cached keys and values that rows of continued sequences attend: a ``CrossAttended``.

    Attributes:
        layers: The block before each decoder block, by its number.
        segments: The new rows of each sequence.
        stored: Keys and values of each block.
    """

    layers: Mapping[int, nn.Module]
    segments: Segments
    stored: Mapping[int, CrossCache]

    def before_block(self, layer: int, hidden: Tensor, dropout: Dropout | None) -> Tensor:
        """See ``CrossAttended``."""
        stored = self.stored[layer]
        visible = rows_with_keys(self.segments, stored.segments)
        streamed: Tensor = self.layers[layer](hidden, stored, self.segments, stored.segments, visible, dropout)[0]
        return streamed


def _last_span_keys(segments: Segments, media: MediaBlock, device: torch.device) -> tuple[Tensor, Segments]:
    """Attended rows of the span that each sequence ends in: what the tokens to come will see."""
    ends = np.array(media.span_tokens.bounds[1:])
    pieces = []
    for start, end in zip(segments.bounds, segments.bounds[1:], strict=False):
        span = int(np.searchsorted(ends, end))  # The first span to reach the end of the sequence is its last.
        inside = end > start and span < len(ends)
        pieces.append(np.arange(*media.span_keys.bounds[span : span + 2]) if inside else np.arange(0))
    parts = Segments.from_lengths([len(piece) for piece in pieces])
    return torch.from_numpy(np.concatenate(pieces)).to(device), Segments(parts.cu.to(device), parts.bounds)
