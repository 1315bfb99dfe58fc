"""The text decoder. It does not handle images.

A connector changes rows of the decoder's input, or runs cross-attention blocks between the decoder's blocks.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.batch import AttentionSegments, BranchedSegments, MultimodalBatch
from data_pipeline.io.strict import StrictConfig
from mmscale.models.image_tokens import (
    AnyImageTokensConfig,
    ImageTokenEmbedding,
    SeparateImageTokensConfig,
    VocabularyImageTokensConfig,
)
from mmscale.models.kv_cache import KVCache
from mmscale.models.vocabulary import TokenEmbedding
from mmscale.nn.attention_backends import Backend, num_pairs
from mmscale.nn.block import (
    AttentionConfig,
    DenseMlpConfig,
    NormConfig,
    NormPlacement,
    TransformerBlock,
    block_products,
    build_norm,
)
from mmscale.nn.dropout import Dropout
from mmscale.nn.flops import Product, linear_product
from mmscale.nn.init import set_init_scale
from mmscale.nn.moe import MoeConfig
from mmscale.nn.rope import RopeConfig, rotated_width, text_rotation
from mmscale.nn.router import RoutedRows, RouterTensors
from mmscale.nn.sizes import Layers, ShrunkTo, Vocabulary, Width

MlpConfig = Annotated[DenseMlpConfig | MoeConfig, Field(discriminator="kind")]


class ExtraTokensConfig(StrictConfig):
    """Embedding rows for ids after the vocabulary. They are separate parameters: the component ``extra_tokens``."""

    rows: Annotated[Vocabulary, ShrunkTo(8)]
    """Number of extra ids: ``vocab_size``, ``vocab_size + 1``, ..."""
    predicted: bool = True
    """Whether the language head has rows for them too. False for ids that occur only in the input, such as image
    placeholders (Llama 3.2 Vision, Molmo). Such an id must not be a label with loss; this is not checked, and the loss
    would read a logit that does not exist."""


class DecoderConfig(StrictConfig):
    """A causal text decoder."""

    vocab_size: Vocabulary
    """V, rows of the embedding. ``vocab_size + extra_tokens.rows`` must be at least the size of the tokenizer's
    vocabulary."""
    extra_tokens: ExtraTokensConfig | None = None
    """Tokens with separate embedding parameters, which can be trained while the table is frozen; null for none."""
    image_tokens: AnyImageTokensConfig | None = None
    """Tokens that stand for the codes of an image tokenizer, so that the decoder reads and draws images: ids of the
    ``vocabulary``, or ids with a ``separate`` embedding and head. Null for a decoder that draws no images."""
    hidden_dim: Width
    """D, width of the residual stream."""
    num_layers: Layers
    """Number of blocks with self-attention. The connector's cross-attention blocks are additional."""
    attention: AttentionConfig
    """Heads, biases, query/key norms."""
    mlp: MlpConfig
    """Feed-forward of the blocks: ``dense`` or ``moe``."""
    norm: NormConfig = NormConfig()
    """Kind and epsilon of all norms."""
    norm_placement: NormPlacement = NormPlacement.PRE
    """Norms before the sub-layers (Llama) or after them (OLMo 2)."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""
    learned_positions: Vocabulary | None = None
    """Number of learned position vectors, added to the input of the first block (CLIP's text tower, GPT-2). No document
    may have more tokens. Requires ``rope: null``. Null for no learned positions."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output projection."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the output of each sub-layer, those of cross-attention blocks included."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate in training on the probabilities of self-attention (Emu3's code: 0.1). Needs
    ``engine.attention: sdpa``, and memory that grows with the square of a document's length."""
    dropout_rows: Literal["all", "learned"] = "all"
    """Rows that dropout applies to: ``all``, or ``learned`` for those whose label carries loss (Molmo's captioner)."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the initial weights; null: ``1 / sqrt(last dimension)``, the fan-in of projections. Divided
    by ``sqrt(2 * num_layers)`` for projections that write to the residual stream."""

    @property
    def num_ids(self) -> int:
        """Number of ids with an embedding in the vocabulary. Separate image tokens have the ids after them."""
        return self.vocab_size + (self.extra_tokens.rows if self.extra_tokens else 0)

    @property
    def predicted_rows(self) -> int:
        """Number of extra ids with a logit."""
        return self.extra_tokens.rows if self.extra_tokens and self.extra_tokens.predicted else 0

    @property
    def separate_image_tokens(self) -> SeparateImageTokensConfig | None:
        """The image tokens, if they have an embedding and a head of their own."""
        return self.image_tokens if isinstance(self.image_tokens, SeparateImageTokensConfig) else None

    @property
    def image_ids(self) -> range:
        """Token ids of the codes 0, 1, ...; empty without image tokens."""
        if self.image_tokens is None:
            return range(0)
        separate = self.separate_image_tokens is not None
        first = self.num_ids if separate else self.image_tokens.first_id  # type: ignore[union-attr]
        return range(first, first + self.image_tokens.codes)

    def block_mlps(self) -> list[DenseMlpConfig | MoeConfig]:
        """Return the feed-forward of each block."""
        return [self.mlp.for_block(number) for number in range(self.num_layers)]

    def media_needs(self) -> dict[str, Any]:
        """Return the fields of ``MediaSpec`` that depend on the decoder."""
        needs = {"max_document_tokens": self.learned_positions}
        if self.rope is None or self.rope.sections is None:
            return {**needs, "position_axes": 1}
        names = ("tokens_per_second", "text_after_video")
        return {**needs, "position_axes": 3, **{name: getattr(self.rope, name) for name in names}}

    def counts(self, batch: MultimodalBatch) -> dict[str, int]:
        """Return the counts of ``batch`` that the decoder's operations are proportional to."""
        queries, keys = batch.segments, batch.segments
        if batch.branched is not None:
            queries, keys = batch.branched.queries, batch.branched.keys
        rows = {"token_rows": batch.segments.total, "routed_rows": batch.num_tokens}  # Dummy rows use no expert.
        return {**rows, "token_pairs": num_pairs(queries, keys)}

    def block_products(self, mlp: DenseMlpConfig | MoeConfig, *, learns: bool, flows: bool) -> list[Product]:
        """Return the operations of a block with the feed-forward ``mlp``; see ``mmscale.nn.block.block_products``."""
        return block_products(
            self.hidden_dim,
            self.attention,
            mlp,
            "token",
            learns=learns,
            flows=flows,
            ends_in_product=self.norm_placement is NormPlacement.PRE,
        )

    def head_products(self, *, learns: bool, extra_learns: bool, flows: bool) -> list[Product]:
        """Return the head's operations per row with logits: those of the vocabulary, then those of extra tokens."""
        known, extra = 2 * self.hidden_dim * self.vocab_size, 2 * self.hidden_dim * self.predicted_rows
        return [
            linear_product("logit_rows", known, weights=learns, inputs=flows),
            linear_product("new_logit_rows", extra, weights=extra_learns, inputs=flows),
        ]

    def image_products(self, *, learns: bool, flows: bool) -> list[Product]:
        """Return the operations of separate image tokens: of their embedding, which every row passes, and their head.

        The head's first layer runs on every row of a training step (``image_head_rows``), its second on the rows whose
        label is an image token (``image_logit_rows``).
        """
        tokens, dim = self.separate_image_tokens, self.hidden_dim
        if tokens is None:
            return []
        return [
            linear_product("token_rows", 2 * tokens.code_dim * dim, weights=learns, inputs=learns),
            linear_product("token_rows", 2 * dim * dim, weights=learns, inputs=learns),
            linear_product("image_head_rows", 2 * dim * dim, weights=learns, inputs=flows),
            linear_product("image_logit_rows", 2 * dim * tokens.codes, weights=learns, inputs=learns or flows),
        ]

    @model_validator(mode="after")
    def _consistent(self) -> DecoderConfig:
        drawn = self.image_tokens
        if isinstance(drawn, VocabularyImageTokensConfig) and self.image_ids.stop > self.num_ids:
            raise ValueError(
                f"image_tokens.first_id={drawn.first_id}: {drawn.codes} codes need the ids below "
                f"{self.image_ids.stop}, and the decoder has {self.num_ids} (vocab_size, extra_tokens); set a smaller "
                "first_id or more rows"
            )
        if (
            isinstance(drawn, VocabularyImageTokensConfig)
            and self.image_ids.stop > self.vocab_size + self.predicted_rows
        ):
            raise ValueError("extra_tokens.predicted=false: image_tokens of the vocabulary need logits; set it to true")
        head_dim = self.attention.resolved_head_dim(self.hidden_dim)
        if self.rope is not None and self.learned_positions is not None:
            raise ValueError(
                f"learned_positions={self.learned_positions}: a decoder has one kind of positions; set rope=null"
            )
        if self.rope is not None:
            width = rotated_width(head_dim, self.rope)
            if width < 2 or width % 2:
                raise ValueError(
                    f"rope.fraction={self.rope.fraction}: rotates {width} of {head_dim} channels of a head; "
                    "must be an even number of at least 2"
                )
            sections = self.rope.sections
            if sections is not None and (sum(sections) != width // 2 or min(sections) < 0):
                raise ValueError(f"rope.sections={list(sections)}: must sum to {width // 2}, half the rotated channels")
        return self


@runtime_checkable
class CrossAttentionHooks(Protocol):
    """Cross-attention of one forward pass: blocks that run before decoder blocks, and the rows that they attend to."""

    @property
    def layers(self) -> Container[int]:
        """0-based numbers of the decoder blocks with a cross-attention block before them."""

    def before_block(self, layer: int, hidden: Float[Tensor, "T D"], dropout: Dropout | None) -> Float[Tensor, "T D"]:
        """Run the cross-attention block before decoder block ``layer``; return the residual stream after it."""


class Decoder(nn.Module):
    """Token embedding, blocks, final norm. ``forward`` starts from embedded tokens; the caller uses ``embed_tokens``.

    Source: Llama (arXiv 2302.13971, section 2.2) and its successors, GPT-2 (Radford et al. 2019) for learned positions;
    the options are named in ``DecoderConfig``.
    """

    def __init__(self, config: DecoderConfig, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.attention.resolved_head_dim(config.hidden_dim)
        extra = 0 if config.extra_tokens is None else config.extra_tokens.rows
        tokens = config.separate_image_tokens
        image = None if tokens is None else ImageTokenEmbedding(tokens, config.hidden_dim)
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_dim, extra, image)
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
        rows: RoutedRows | None,
        cross_attention: CrossAttentionHooks | None,
        cache: KVCache | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Tensor, "T D"], RouterTensors | None]:
        """Run the blocks and the final norm.

        Args:
            hidden: Embedded tokens, with the connector's features in their rows.
            position_ids: ``(T,)`` or ``(T, 3)``.
            segments: Documents, and their branches.
            rows: Rows for the routers; may be None without experts.
            cross_attention: Cross-attention blocks to run before some decoder blocks; None for none.
            cache: Keys and values of earlier rows; extended in place. The caller must have called ``cache.advance``.
            dropout: Masks of this microbatch; None for no dropout.

        Returns:
            The normalised stream, and the sums of the routers, or None without experts.

        Raises:
            ValueError: a document, or the capacity of ``cache``, is longer than ``learned_positions``.
        """
        if self.embed_positions is not None:
            self._check_length(segments, cache)
            hidden = hidden + self.embed_positions(position_ids)
        rope = self.config.rope
        rotation = None if rope is None else text_rotation(position_ids, self.head_dim, rope, hidden.dtype)
        routed: list[RouterTensors] = []
        for number, layer in enumerate(self.layers):
            if cross_attention is not None and number in cross_attention.layers:
                # Negative block numbers give cross-attention blocks masks of their own.
                cross_dropout = None if dropout is None else dropout.for_block(-1 - number)
                hidden = cross_attention.before_block(number, hidden, cross_dropout)
            layer_cache = None if cache is None else cache.layer(number)
            layer_dropout = None if dropout is None else dropout.for_block(number)
            hidden, sums = layer(hidden, rotation, segments, rows, layer_cache, layer_dropout)
            if sums is not None:
                routed.append(sums)
        return self.norm(hidden), RouterTensors.stack(routed) if routed else None

    def _check_length(self, segments: AttentionSegments, cache: KVCache | None) -> None:
        """Raise ``ValueError`` if positions exceed the table. An out-of-range lookup would fail on the device."""
        whole = segments.keys if isinstance(segments, BranchedSegments) else segments
        longest = whole.longest if cache is None else cache.capacity
        if longest > (rows := self.config.learned_positions or 0):
            sequence = "a document" if cache is None else "a prompt with its new tokens"
            raise ValueError(f"{sequence} of {longest} tokens exceeds decoder.learned_positions={rows}")
