"""Configuration of a model: a decoder, and with it a vision tower and a connector, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.models.connector_config import (
    CAbstractorConfig,
    ConnectorConfig,
    ContrastiveConnectorConfig,
    CrossAttentionConnectorConfig,
    HybridConnectorConfig,
    ProjectorConfig,
    SeeingConnectorConfig,
)
from mmscale.models.vision_config import AnyVisionConfig, PatchesConfig, VisionConfig
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.block import NormPlacement
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.norms import NormConfig
from mmscale.nn.rope import RopeConfig, rotated_width
from mmscale.nn.sizes import Layers, Vocabulary, Width

MlpConfig = Annotated[DenseMlpConfig | MoeConfig, Field(discriminator="kind")]


class ExtraTokensConfig(StrictConfig):
    """Rows for ids behind the vocabulary, parameters of their own: the component ``extra_tokens``."""

    rows: Vocabulary
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


class TowerConfig(StrictConfig):
    """A vision tower by itself: its weights can be counted, imported, exported, and taken into a model."""

    vision: VisionConfig
    """The tower."""


class ModelConfig(StrictConfig):
    """A multimodal model, or a text model if ``vision`` and ``connector`` are null."""

    decoder: DecoderConfig
    """The text decoder."""
    vision: AnyVisionConfig | None = None
    """The image tower: a ``transformer`` (the default kind), or ``patches`` as they are; null for a text model."""
    connector: ConnectorConfig | None = None
    """How image features reach the decoder; null for a text model."""

    @property
    def components(self) -> tuple[str, ...]:
        """What a stage can freeze and train by name: the keys of ``MultimodalModel.components()``."""
        tower = ("vision",) if isinstance(self.vision, VisionConfig) else ()  # Patches have nothing to learn.
        towers = (*tower, "connector") if self.vision is not None else ()
        return (*towers, "decoder", *(("extra_tokens",) if self.decoder.extra_tokens else ()))

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.vision is None) != (self.connector is None):
            raise ValueError("vision and connector: set both, or neither for a text model")
        if isinstance(self.connector, CrossAttentionConnectorConfig | HybridConnectorConfig):
            if self.connector.every > self.decoder.num_layers:
                raise ValueError(
                    f"connector.every={self.connector.every}: a decoder of {self.decoder.num_layers} blocks gets none"
                )
            if self.connector.attention is not None:
                try:
                    self.connector.attention.resolved_head_dim(self.decoder.hidden_dim)
                except ValueError as error:
                    raise ValueError(f"connector.attention.{error}") from None
            if (
                self.connector.mlp is None
                and isinstance(self.decoder.mlp, MoeConfig)
                and self.decoder.mlp.dense is None
            ):
                raise ValueError(
                    "connector.mlp: set it; a decoder with experts in every block has no dense one to copy"
                )
        if self.vision is None or self.connector is None:
            return self
        if isinstance(self.connector, ContrastiveConnectorConfig):
            _check_contrastive(self.vision, self.connector, self.decoder)
        else:
            _check_merge(self.vision, self.connector.projector)
            _check_places(self.vision, self.connector.projector)
            _check_tiles(self.vision, self.connector)
        return self


def _check_merge(vision: VisionConfig | PatchesConfig, projector: ProjectorConfig) -> None:
    if any(side % projector.merge for side in vision.fixed_grid or ()):
        raise ValueError(
            f"connector.projector.merge={projector.merge}: must divide both sides of vision.positions.grid"
        )


def _check_tiles(vision: VisionConfig | PatchesConfig, connector: SeeingConnectorConfig) -> None:
    if vision.class_feature and not (
        isinstance(connector, CrossAttentionConnectorConfig) and connector.projector.merge == 1
    ):
        raise ValueError(
            "vision.class_feature: has no place among embedded or merged patches; use connector.kind="
            "cross_attention with projector.merge=1"
        )
    if vision.tiles is not None and isinstance(connector, HybridConnectorConfig):
        raise ValueError("vision.tiles: knows tiles alone, but connector.kind=hybrid needs a view of the whole image")


def _check_contrastive(
    vision: VisionConfig | PatchesConfig, connector: ContrastiveConnectorConfig, decoder: DecoderConfig
) -> None:
    if not isinstance(vision, VisionConfig):
        raise ValueError("vision.kind=patches: has nothing to train by pairs; use kind=transformer")
    if vision.tiles is not None:
        raise ValueError("vision.tiles: a pair has one view of its image; leave tiles to a later stage")
    if vision.class_feature != (connector.pool == "class"):
        wanted = "needs the class token" if connector.pool == "class" else "takes patches alone"
        raise ValueError(
            f"connector.pool={connector.pool}: {wanted}; set vision.class_feature="
            f"{str(not vision.class_feature).lower()}"
        )
    if decoder.tie_embeddings or decoder.predicted_rows:
        name = "tie_embeddings" if decoder.tie_embeddings else "extra_tokens.predicted"
        raise ValueError(f"decoder.{name}: a contrastive model predicts no token and has no head; set it to false")
    if decoder.dropout:
        raise ValueError(
            f"decoder.dropout={decoder.dropout:g}: a contrastive step may compute its vectors twice, which must be the "
            "same; set it to 0"
        )
    if isinstance(decoder.mlp, MoeConfig):
        raise ValueError("decoder.mlp.kind=moe: a contrastive loss has no place for those of routers; use dense")


def _check_places(vision: VisionConfig | PatchesConfig, projector: ProjectorConfig) -> None:
    if not isinstance(projector, CAbstractorConfig) or projector.positions is None:
        return
    if projector.positions.grid != vision.fixed_grid:
        seen = "views of any size" if vision.fixed_grid is None else f"views of {list(vision.fixed_grid)}"
        raise ValueError(
            f"connector.projector.positions.grid={list(projector.positions.grid)}: the tower takes {seen}; give its "
            "grid, or null for no positions"
        )


AnyModelConfig = ModelConfig | TowerConfig


def read_model_config(values: Mapping[str, Any]) -> AnyModelConfig:
    """Of JSON values: a model where they have a decoder, else a tower.

    Raises:
        ValidationError: they are neither.
    """
    return (ModelConfig if "decoder" in values else TowerConfig).model_validate(values)
