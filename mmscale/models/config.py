"""Configuration of a model: a decoder, and with it a vision tower and a connector, or neither."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from data_pipeline.strict import StrictConfig
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.block import NormPlacement
from mmscale.nn.mlp import Activation, DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.norms import NormConfig
from mmscale.nn.rope import LearnedPositionsConfig, RopeConfig, Rotary2dConfig, rotated_width

MlpConfig = Annotated[DenseMlpConfig | MoeConfig, Field(discriminator="kind")]
PositionsConfig = Annotated[LearnedPositionsConfig | Rotary2dConfig, Field(discriminator="kind")]


class ExtraTokensConfig(StrictConfig):
    """Rows for ids behind the vocabulary, parameters of their own: the component ``extra_tokens``."""

    rows: int = Field(gt=0)
    """New ids: ``vocab_size``, ``vocab_size + 1``, ..."""
    predicted: bool = True
    """Whether the language head has rows for them too. False for ids that are only read, as image placeholders
    (Llama 3.2 Vision, Molmo): none of them may be a label that carries loss."""


class DecoderConfig(StrictConfig):
    """A causal text decoder."""

    vocab_size: int = Field(gt=0)
    """V, rows of the embedding; with ``extra_tokens`` at least the tokenizer's vocabulary."""
    extra_tokens: ExtraTokensConfig | None = None
    """New tokens beside the table, so that they can learn while its rows are frozen; null for none."""
    hidden_dim: int = Field(gt=0)
    """D, width of the residual stream."""
    num_layers: int = Field(gt=0)
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
        if self.rope is not None:
            width = rotated_width(head_dim, self.rope)
            if width % 2:
                raise ValueError(f"rope.fraction={self.rope.fraction}: {width} of {head_dim} channels; must be even")
            sections = self.rope.sections
            if sections is not None and sum(sections) != width // 2:
                raise ValueError(f"rope.sections={list(sections)}: must sum to {width // 2}, half the rotated channels")
        return self


class TilesConfig(StrictConfig):
    """The tiles of an image know their places in it and see each other.

    Source: Llama 3 (arXiv 2407.21783, section 7.1) and the reference code of Llama 3.2 Vision.
    """

    max_tiles: int = Field(default=4, ge=1, le=64)
    """Tiles of an image at most: tables have a row for each grid of so many."""
    global_layers: int = Field(default=8, ge=0)
    """Gated blocks behind ``post_norm`` and a second embedding of tiles; ``last_output`` is theirs."""
    attend_absent: bool = True
    """Compute absent tiles and rows that fill up each tile, and let every patch attend them, as the published weights
    were trained: an image costs ``max_tiles`` tiles. False: real patches alone, which computes something else."""
    gate_init: float = 0.0
    """Start of the gates of embeddings of tiles; 0 as published: without effect at first."""
    global_gate_init: float = math.pi / 4
    """Start of the gates in the global blocks."""


class _Pixels(StrictConfig):
    patch_size: int = Field(gt=0)
    """Side of a square patch, pixels."""
    channels: int = Field(default=3, gt=0)
    """Colour channels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from pixels scaled to 0..1, per channel."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Divides after that, per channel."""

    @model_validator(mode="after")
    def _one_per_channel(self) -> _Pixels:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, got {len(self.mean)} and {len(self.std)}")
        return self


class PatchesConfig(_Pixels):
    """No tower: the features of a patch are its normalised pixels (Fuyu). It has no parameters."""

    kind: Literal["patches"]
    class_feature: ClassVar[bool] = False
    tiles: ClassVar[None] = None

    @property
    def feature_dim(self) -> int:
        """Channels of a patch's features."""
        return self.channels * self.patch_size**2

    @property
    def fixed_grid(self) -> None:
        """Views of any size."""
        return None


class VisionConfig(_Pixels):
    """A vision transformer over packed patches of any number of images."""

    kind: Literal["transformer"] = "transformer"
    hidden_dim: int = Field(gt=0)
    """Width of the tower."""
    num_layers: int = Field(gt=0)
    """Blocks."""
    attention: AttentionConfig
    """Heads, biases, per-head norms."""
    mlp: DenseMlpConfig
    """Feed-forward of the blocks."""
    norm: NormConfig = NormConfig()
    """Kind and epsilon of all norms."""
    positions: PositionsConfig
    """``learned`` for views of one fixed size, ``rotary_2d`` for native resolution."""
    class_token: bool = False
    """Put a learned token first in every view (CLIP); it is dropped from the features. ``learned`` positions only."""
    class_feature: bool = False
    """Keep it: a view's first feature is its class token's (Llama 3.2 Vision). For cross-attention."""
    tiles: TilesConfig | None = None
    """Tiles of an image are computed together (Llama 3.2 Vision); null: every view is by itself."""
    patch_bias: bool = False
    """Bias on the patch projection."""
    temporal_patch: int = Field(default=1, gt=0)
    """Frames that the patch projection has weights for; a still image counts as so many equal ones (Qwen2-VL: 2)."""
    pre_norm: bool = False
    """A norm before the first block (CLIP, Pixtral)."""
    post_norm: bool = True
    """A norm after the last block."""
    layer_scale: float | None = None
    """Start of learned per-channel factors on the branches (InternViT: 0.1); null for none."""
    feature_layers: tuple[int, ...] = ()
    """0-based blocks whose outputs, not normalised, are concatenated behind the last one's (Llama 3.2 Vision)."""
    feature_order: Literal["layers", "channels"] = "layers"
    """How those of ``feature_layers`` lie: one block's channels after the other's, or the first channel of all blocks,
    then the second, ... (Llama 3.2 Vision)."""
    last_output: bool = True
    """Whether features hold the last block's output, normalised; if not, ``feature_layers`` alone (Molmo)."""
    idle_layers: int = Field(default=0, ge=0)
    """Blocks behind the last of ``feature_layers``, kept because published weights hold them (Molmo: 1). They are
    computed and learn nothing."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the first weights; null: ``1 / sqrt(fan-in)``."""

    @property
    def feature_dim(self) -> int:
        """Channels of a patch's features."""
        return self.hidden_dim * (len(self.feature_layers) + self.last_output)

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """Patches (rows, columns) of every view; None for any size."""
        return self.positions.grid if isinstance(self.positions, LearnedPositionsConfig) else None

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        head_dim = self.attention.resolved_head_dim(self.hidden_dim)
        if isinstance(self.positions, Rotary2dConfig):
            if head_dim % 4:
                raise ValueError(f"positions.kind=rotary_2d needs heads of a multiple of 4 channels, got {head_dim}")
            if self.class_token:
                raise ValueError("class_token: has no place in the grid of rotary_2d positions; use learned positions")
        if any(not 0 <= layer < self.num_layers for layer in self.feature_layers):
            raise ValueError(
                f"feature_layers={list(self.feature_layers)}: blocks are numbered 0..{self.num_layers - 1}"
            )
        unused = 0 if self.last_output else self.num_layers - 1 - max(self.feature_layers, default=-1)
        if unused != self.idle_layers:
            if not self.idle_layers:
                raise ValueError(
                    "last_output=false: the last block's output is unused; build fewer blocks, name it in "
                    f"feature_layers, or keep it as it is with idle_layers={unused}"
                )
            raise ValueError(f"idle_layers={self.idle_layers}: the outputs of the last {unused} blocks are unused")
        if not self.last_output and self.post_norm:
            raise ValueError("last_output=false: post_norm would normalise nothing; set post_norm=false")
        if self.class_feature and not self.class_token:
            raise ValueError("class_feature: there is no class token to keep; set class_token=true")
        if self.tiles is not None:
            self._check_tiles(self.tiles)
        return self

    def _check_tiles(self, tiles: TilesConfig) -> None:
        if isinstance(self.positions, Rotary2dConfig):
            raise ValueError("tiles: are of one size each; use positions.kind=learned, not rotary_2d")
        if not self.last_output:
            raise ValueError("last_output=false: what tiles do behind the last block would be unused")
        if tiles.attend_absent and self.patch_bias:
            raise ValueError("tiles.attend_absent: an absent tile has no patches to project; set patch_bias=false")


def _vision_kind(value: Any) -> Any:
    """A block without ``kind`` is a transformer."""
    if isinstance(value, Mapping):
        return value.get("kind", "transformer")
    return getattr(value, "kind", None)


AnyVisionConfig = Annotated[
    Annotated[VisionConfig, Tag("transformer")] | Annotated[PatchesConfig, Tag("patches")],
    Discriminator(_vision_kind),
]


class _Projector(StrictConfig):
    merge: int = Field(default=1, gt=0)
    """Side of the square of patches that becomes one feature (pixel shuffle); 1 for none."""
    norm: Literal["none", "before_merge", "after_merge"] = "none"
    """Where a layer norm stands: per patch (Qwen2-VL), per merged feature (NVLM), or nowhere."""
    norm_eps: float = 1e-6
    """Its epsilon: 1e-6 in Qwen2-VL, 1e-5 in NVLM."""
    bias: bool = True
    """Biases on the projections."""


class LinearProjectorConfig(_Projector):
    """One linear layer."""

    kind: Literal["linear"] = "linear"


class MlpProjectorConfig(_Projector):
    """Two linear layers."""

    kind: Literal["mlp"] = "mlp"
    hidden_dim: int | None = None
    """Channels between the layers; null: the decoder's width."""
    activation: Activation = Activation.GELU
    """Between the layers."""


class AttentionPoolConfig(StrictConfig):
    """The mean of a square of patches attends these patches; a feed-forward of its own width follows (Molmo)."""

    kind: Literal["attention_pool"] = "attention_pool"
    merge: int = Field(default=2, gt=0)
    """Side of the square of patches that becomes one feature."""
    num_heads: int = Field(gt=0)
    """H of the pooling attention; its projections have biases."""
    head_dim: int = Field(gt=0)
    """K; what is pooled has ``num_heads * head_dim`` channels."""
    mlp: DenseMlpConfig
    """From the pooled channels to the decoder's width."""


class CAbstractorConfig(StrictConfig):
    """Convolutions over the grid of a view, pooled to a square in their midst (Honeybee, MM1, MM1.5)."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    side: int = Field(default=12, gt=0)
    """Side of the square of features that each view becomes."""
    hidden_dim: int = Field(gt=0)
    """Channels of the convolutions."""
    depth: int = Field(default=3, gt=0)
    """Blocks before the pooling, and as many behind it."""
    positions: LearnedPositionsConfig | None = None
    """A learned vector added at each place of the tower's grid, which must be the tower's; null for none."""

    @property
    def merge(self) -> int:
        """Grids of any sides are pooled."""
        return 1


ProjectorConfig = Annotated[
    LinearProjectorConfig | MlpProjectorConfig | AttentionPoolConfig | CAbstractorConfig, Field(discriminator="kind")
]


class EmbeddingConnectorConfig(StrictConfig):
    """Image features take the place of token embeddings (LLaVA, Qwen2-VL, Pixtral, NVLM-D), or are added (Molmo)."""

    kind: Literal["embedding"] = "embedding"
    projector: ProjectorConfig = MlpProjectorConfig()
    """From tower features to the decoder's width."""
    combine: Literal["replace", "add"] = "replace"
    """What features do to the embeddings of their placeholders."""
    padding: bool = False
    """Add learned vectors to the features of patches that show padding, one kind where all of the patch is padding
    and another where some of it is (Molmo)."""


class _Attended(StrictConfig):
    projector: ProjectorConfig = LinearProjectorConfig()
    """From tower features to the decoder's width."""
    every: int = Field(default=4, gt=0)
    """A cross-attention block stands before decoder blocks n-1, 2n-1, ... (0-based)."""
    attention: AttentionConfig | None = None
    """Heads of the cross-attention; null: as the decoder's."""
    mlp: DenseMlpConfig | None = None
    """Feed-forward of the cross-attention blocks; null: as the decoder's, which must be dense then."""
    gate_init: float = 0.0
    """Start of the tanh gates on both branches; 0 as published: the decoder is unchanged at first."""


class UnseenText(str, Enum):
    """What cross-attention does for text before the first image of its document."""

    SILENT = "silent"
    """Nothing, neither attention nor feed-forward: the reference code of Llama 3.2 Vision."""
    LOOKS_AHEAD = "looks_ahead"
    """It attends to all images of the document, those that come later and absent tiles included; no feed-forward:
    transformers."""


class CrossAttentionConnectorConfig(_Attended):
    """Every view is attended by gated cross-attention blocks (Llama 3.2 Vision, NVLM-X)."""

    kind: Literal["cross_attention"] = "cross_attention"
    unseen_text: UnseenText = UnseenText.SILENT
    """Text before the first image: ``silent``, or ``looks_ahead`` to train what transformers computes."""


class HybridConnectorConfig(_Attended):
    """The overview takes token places, tiles are attended (NVLM-H)."""

    kind: Literal["hybrid"] = "hybrid"


ConnectorConfig = Annotated[
    EmbeddingConnectorConfig | CrossAttentionConnectorConfig | HybridConnectorConfig, Field(discriminator="kind")
]


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
            if (
                self.connector.mlp is None
                and isinstance(self.decoder.mlp, MoeConfig)
                and self.decoder.mlp.dense is None
            ):
                raise ValueError(
                    "connector.mlp: set it; a decoder with experts in every block has no dense one to copy"
                )
        if self.vision is not None and self.connector is not None and self.vision.fixed_grid is not None:
            merge = self.connector.projector.merge
            if any(side % merge for side in self.vision.fixed_grid):
                raise ValueError(f"connector.projector.merge={merge}: must divide both sides of vision.positions.grid")
        if self.vision is not None and self.connector is not None:
            _check_places(self.vision, self.connector.projector)
            self._check_tiles(self.vision, self.connector)
        return self

    def _check_tiles(self, vision: VisionConfig | PatchesConfig, connector: ConnectorConfig) -> None:
        if vision.class_feature and not (
            isinstance(connector, CrossAttentionConnectorConfig) and connector.projector.merge == 1
        ):
            raise ValueError(
                "vision.class_feature: has no place among embedded or merged patches; use connector.kind="
                "cross_attention with projector.merge=1"
            )
        if vision.tiles is not None and isinstance(connector, HybridConnectorConfig):
            raise ValueError(
                "vision.tiles: knows tiles alone, but connector.kind=hybrid needs a view of the whole image"
            )


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
