"""The text decoder. It knows nothing of images: a connector replaces rows of its input and runs before some blocks."""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data_pipeline.batch import AttentionSegments, BranchedSegments
from mmscale.models.decoder_config import DecoderConfig
from mmscale.models.embedding import TokenEmbedding
from mmscale.models.kv_cache import KVCache
from mmscale.nn.attention_backends import Backend
from mmscale.nn.block import TransformerBlock
from mmscale.nn.dropout import Dropout
from mmscale.nn.init import set_init_scale
from mmscale.nn.norms import build_norm
from mmscale.nn.rope import Rotation, text_rotation


@runtime_checkable
class CrossAttended(Protocol):
    """Cross-attention of one forward pass: blocks of the connector and the rows that they attend."""

    @property
    def layers(self) -> Container[int]:
        """0-based numbers of the decoder blocks that a cross-attention block precedes."""

    def before_block(self, layer: int, hidden: Float[Tensor, "T D"], dropout: Dropout | None) -> Float[Tensor, "T D"]:
        """Return the residual stream after the cross-attention block that precedes decoder block ``layer``."""


class Decoder(nn.Module):
    """Embedding, blocks, last norm.

    Source: Llama (arXiv 2302.13971, section 2.2) and its successors, GPT-2 (Radford et al. 2019) for learned positions;
    the options are named in ``DecoderConfig``.
    """

    def __init__(self, config: DecoderConfig, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.attention.resolved_head_dim(config.hidden_dim)
        extra = 0 if config.extra_tokens is None else config.extra_tokens.rows
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_dim, extra)
        self.embed_positions: nn.Module | None = None
        if config.learned_positions is not None:
            self.embed_positions = nn.Embedding(config.learned_positions, config.hidden_dim)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.hidden_dim,
                config.attention,
                mlp,
                config.norm,
                backend,
                causal=True,
                placement=config.norm_placement,
            )
            for mlp in config.block_mlps()
        )
        self.norm = build_norm(config.norm, config.hidden_dim)
        set_init_scale(self, config.num_layers, config.init_std)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        position_ids: Int[Tensor, "T ..."],
        segments: AttentionSegments,
        valid: Bool[Tensor, " T"],
        attended: CrossAttended | None,
        cache: KVCache | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "2"] | None]:
        """Runs the blocks.

        Args:
            hidden: Embedded tokens, with rows replaced as the connector wants.
            position_ids: ``(T,)`` or ``(T, 3)``.
            segments: Documents, and their branches.
            valid: Rows that count in router statistics.
            attended: Cross-attention that runs before some blocks; None for none.
            cache: Keys and values of earlier rows; extended in place.
            dropout: Of this microbatch; None for none.

        Returns:
            The normalised stream, and the mean (balance, z) of the blocks with experts, if there are any.

        Raises:
            ValueError: a document, or what ``cache`` has room for, is longer than the table of positions.
        """
        if self.embed_positions is not None:
            self._check_length(segments, cache)
            hidden = hidden + self.embed_positions(position_ids)
        rotation = self._rotation(position_ids, hidden.dtype)
        losses = []
        for number, layer in enumerate(self.layers):
            if attended is not None and number in attended.layers:
                # Dropout counts cross-attention blocks below 0, where no decoder block is.
                cross_dropout = None if dropout is None else dropout.of_block(-1 - number)
                hidden = attended.before_block(number, hidden, cross_dropout)
            layer_cache = None if cache is None else cache.layer(number)
            layer_dropout = None if dropout is None else dropout.of_block(number)
            hidden, router_losses = layer(hidden, rotation, segments, valid, layer_cache, layer_dropout)
            if router_losses is not None:
                losses.append(router_losses)
        return self.norm(hidden), torch.stack(losses).mean(0) if losses else None

    def _check_length(self, segments: AttentionSegments, cache: KVCache | None) -> None:
        """On the host, where lengths are known: a lookup behind the table would be an error of the device."""
        whole = segments.keys if isinstance(segments, BranchedSegments) else segments
        longest = whole.longest if cache is None else cache.capacity
        if longest > (rows := self.config.learned_positions or 0):
            what = "a document" if cache is None else "a prompt with the tokens to come"
            raise ValueError(f"{what} of {longest} tokens: decoder.learned_positions={rows} has no more positions")

    def _rotation(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation | None:
        rope = self.config.rope
        return None if rope is None else text_rotation(position_ids, self.head_dim, rope, dtype)
