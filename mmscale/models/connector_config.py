"""Configuration of connectors: how image features reach the decoder, and what projects them."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.nn.attention import AttentionConfig
from mmscale.nn.mlp import Activation, DenseMlpConfig
from mmscale.nn.rope import LearnedPositionsConfig
from mmscale.nn.sizes import Epsilon, Heads, Layers, Side, Width


class _Projector(StrictConfig):
    merge: Side = 1
    """Side of the square of patches that becomes one feature (pixel shuffle); 1 for none."""
    norm: Literal["none", "before_merge", "after_merge"] = "none"
    """Where a layer norm stands: per patch (Qwen2-VL), per merged feature (NVLM), or nowhere."""
    norm_eps: Epsilon = 1e-6
    """Its epsilon: 1e-6 in Qwen2-VL, 1e-5 in NVLM."""
    bias: bool = True
    """Biases on the projections."""


class LinearProjectorConfig(_Projector):
    """One linear layer."""

    kind: Literal["linear"] = "linear"


class MlpProjectorConfig(_Projector):
    """Two linear layers."""

    kind: Literal["mlp"] = "mlp"
    hidden_dim: Width | None = None
    """Channels between the layers; null: the decoder's width."""
    activation: Activation = Activation.GELU
    """Between the layers."""


class AttentionPoolConfig(StrictConfig):
    """The mean of a square of patches attends these patches; a feed-forward of its own width follows (Molmo)."""

    kind: Literal["attention_pool"] = "attention_pool"
    merge: Side = 2
    """Side of the square of patches that becomes one feature."""
    num_heads: Heads
    """H of the pooling attention; its projections have biases."""
    head_dim: Heads
    """K; what is pooled has ``num_heads * head_dim`` channels."""
    mlp: DenseMlpConfig
    """From the pooled channels to the decoder's width."""


class CAbstractorConfig(StrictConfig):
    """Convolutions over the grid of a view, pooled to a square in their midst (Honeybee, MM1, MM1.5)."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    side: Side = 12
    """Side of the square of features that each view becomes."""
    hidden_dim: Width
    """Channels of the convolutions."""
    depth: Layers = 3
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
    every: Layers = 4
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


class ContrastiveConnectorConfig(StrictConfig):
    """One vector of an image and one of its text, near each other (CLIP, SigLIP): the decoder is the text's tower."""

    kind: Literal["contrastive"]
    dim: Width
    """Channels of the two vectors."""
    pool: Literal["class", "mean"] = "class"
    """What stands for an image: the tower's ``class`` token (CLIP), which needs ``vision.class_feature``, or the
    ``mean`` of its patches. For a text stands the row of its last token (CLIP)."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """``softmax``: which text of the batch belongs to an image, and which image to a text (CLIP). ``sigmoid``: whether
    they belong together, asked of each text and each image of the batch (SigLIP)."""
    scale_init: float | None = Field(default=None, gt=0)
    """Start of the learned factor on similarities; null: 1 / 0.07 (CLIP), with ``sigmoid`` 10 (SigLIP)."""
    max_scale: float = Field(default=100.0, gt=0)
    """It grows no larger."""
    bias_init: float | None = None
    """Start of the learned number added to them, which ``sigmoid`` alone has; null: -10 (SigLIP)."""

    @property
    def first_scale(self) -> float:
        """``scale_init``, resolved."""
        return self.scale_init or (1 / 0.07 if self.loss == "softmax" else 10.0)

    @property
    def first_bias(self) -> float | None:
        """``bias_init``, resolved; None where there is no bias."""
        if self.loss == "softmax":
            return None
        return -10.0 if self.bias_init is None else self.bias_init

    @model_validator(mode="after")
    def _consistent(self) -> ContrastiveConnectorConfig:
        if self.loss == "softmax" and self.bias_init is not None:
            raise ValueError(
                "bias_init: a softmax is the same whatever is added to all of its logits; use loss=sigmoid"
            )
        if self.first_scale > self.max_scale or math.isinf(self.max_scale):
            raise ValueError(
                f"max_scale={self.max_scale:g}: must be finite and at least scale_init={self.first_scale:g}"
            )
        return self


SeeingConnectorConfig = EmbeddingConnectorConfig | CrossAttentionConnectorConfig | HybridConnectorConfig
"""Those whose decoder sees the features of an image."""

ConnectorConfig = Annotated[
    EmbeddingConnectorConfig | CrossAttentionConnectorConfig | HybridConnectorConfig | ContrastiveConnectorConfig,
    Field(discriminator="kind"),
]
