"""Configuration of a text decoder, and what the decoder says about itself: media needs and operations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.batch import MultimodalBatch
from data_pipeline.io.strict import StrictConfig
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.block import NormPlacement, block_products
from mmscale.nn.flops import Product, linear, num_pairs
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.norms import NormConfig
from mmscale.nn.rope import RopeConfig, rotated_width
from mmscale.nn.sizes import Layers, ShrunkTo, Vocabulary, Width

MlpConfig = Annotated[DenseMlpConfig | MoeConfig, Field(discriminator="kind")]


class ExtraTokensConfig(StrictConfig):
    """Rows for ids behind the vocabulary, parameters of their own: the component ``extra_tokens``."""

    rows: Annotated[Vocabulary, ShrunkTo(8)]
    """New ids: ``vocab_size``, ``vocab_size + 1``, ..."""
    predicted: bool = True
    """Whether the language head has rows for them too. False for ids that are only read, as image placeholders
    (Llama 3.2 Vision, Molmo): none of them may be a label that carries loss."""


class DecoderConfig(StrictConfig):
    """A causal text decoder."""

    vocab_size: Vocabulary
    """V, rows of the embedding; with ``extra_tokens`` at least the tokenizer's vocabulary."""
    extra_tokens: ExtraTokensConfig | None = None
    """New tokens beside the table, so that they can learn while its rows are frozen; null for none."""
    hidden_dim: Width
    """D, width of the residual stream."""
    num_layers: Layers
    """Blocks with self-attention; cross-attention blocks come on top."""
    attention: AttentionConfig
    """Heads, biases, per-head norms."""
    mlp: MlpConfig
    """Feed-forward of the blocks: ``dense`` or ``moe``."""
    norm: NormConfig = NormConfig()
    """Kind and epsilon of all norms."""
    norm_placement: NormPlacement = NormPlacement.PRE
    """Norms before the sub-layers (Llama) or after them (OLMo 2)."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary positions; null for none."""
    learned_positions: Vocabulary | None = None
    """Rows of a table with a learned vector for each position, added to what enters the first block (CLIP's text tower,
    GPT-2): no document may be longer. Instead of ``rope``; null for none."""
    tie_embeddings: bool = False
    """Use the embedding as the output projection."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of what each sub-layer adds to the residual stream that is zeroed in training, cross-attention included."""
    dropout_rows: Literal["all", "learned"] = "all"
    """Which rows that befalls: all, or only those whose label carries loss (Molmo's captioner)."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the first weights; null: ``1 / sqrt(fan-in)``."""

    @property
    def num_ids(self) -> int:
        """Token ids that can be read."""
        return self.vocab_size + (self.extra_tokens.rows if self.extra_tokens else 0)

    @property
    def predicted_rows(self) -> int:
        """Extra ids that have a logit."""
        return self.extra_tokens.rows if self.extra_tokens and self.extra_tokens.predicted else 0

    def block_mlps(self) -> list[DenseMlpConfig | MoeConfig]:
        """The feed-forward of each block."""
        return [self.mlp.of_block(number) for number in range(self.num_layers)]

    def media_needs(self) -> dict[str, Any]:
        """Fields of ``MediaSpec`` that follow from the decoder."""
        axes = 1 if self.rope is None or self.rope.sections is None else 3
        return {"position_axes": axes, "max_document_tokens": self.learned_positions}

    def counts(self, batch: MultimodalBatch) -> dict[str, int]:
        """What the decoder's operations over ``batch`` are proportional to."""
        queries, keys = batch.segments, batch.segments
        if batch.branched is not None:
            queries, keys = batch.branched.queries, batch.branched.keys
        return {"token_rows": batch.segments.total, "token_pairs": num_pairs(queries, keys)}

    def block_products(self, mlp: DenseMlpConfig | MoeConfig, *, learns: bool, flows: bool) -> list[Product]:
        """Operations of a block with the feed-forward ``mlp``; see ``mmscale.nn.block.block_products``."""
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
        """Operations of the head for each row that has logits, those of new tokens last."""
        return [
            linear("logit_rows", 2 * self.hidden_dim * self.vocab_size, weights=learns, inputs=flows),
            linear("new_logit_rows", 2 * self.hidden_dim * self.predicted_rows, weights=extra_learns, inputs=flows),
        ]

    @model_validator(mode="after")
    def _consistent(self) -> DecoderConfig:
        head_dim = self.attention.resolved_head_dim(self.hidden_dim)
        if self.rope is not None and self.learned_positions is not None:
            raise ValueError(f"learned_positions={self.learned_positions}: positions come once; set rope=null")
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
