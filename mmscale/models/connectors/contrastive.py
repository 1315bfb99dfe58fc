"""The contrastive connector: projects an image and a text to vectors in one space."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.media_spec import Placement
from mmscale.models.connectors.connector import ConnectorBase
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product, linear_product
from mmscale.nn.moe import MoeConfig
from mmscale.nn.sizes import Width


class ContrastiveConnectorConfig(ConnectorBase):
    """Trains the vectors of an image and of its text to be similar (CLIP, SigLIP). The decoder is the text tower."""

    placement: ClassVar[Placement] = Placement.PAIR
    predicts_tokens: ClassVar[bool] = False
    training_fields: ClassVar[tuple[str, ...]] = ("scale_init", "max_scale", "bias_init")
    kind: Literal["contrastive"]
    dim: Width
    """Channels of the two vectors."""
    pool: Literal["class", "mean"] = "class"
    """Feature of an image: that of the tower's ``class`` token (CLIP; requires ``vision.class_feature: true``), or the
    ``mean`` of its patches (requires ``vision.class_feature: false``). The feature of a text is the row of its last
    token (CLIP)."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """``softmax``: cross-entropy of the matching text among all texts of the step, and of the matching image among all
    images (CLIP). ``sigmoid``: binary cross-entropy of each combination of an image and a text of the step (SigLIP)."""
    scale_init: float | None = Field(default=None, gt=0)
    """Initial value of the learned factor on similarities. Null: 1 / 0.07 with ``softmax`` (CLIP), 10 with ``sigmoid``
    (SigLIP)."""
    max_scale: float = Field(default=100.0, gt=0)
    """Upper limit of the factor on similarities. Must be finite and at least ``scale_init``."""
    bias_init: float | None = None
    """Initial value of the learned bias on similarities; only with ``loss=sigmoid``. Null: -10 (SigLIP)."""

    @property
    def first_scale(self) -> float:
        """``scale_init``, or the default of the loss."""
        return self.scale_init or (1 / 0.07 if self.loss == "softmax" else 10.0)

    @property
    def first_bias(self) -> float | None:
        """``bias_init``, or the default of the loss; None if the loss has no bias."""
        if self.loss == "softmax":
            return None
        return -10.0 if self.bias_init is None else self.bias_init

    @model_validator(mode="after")
    def _consistent(self) -> ContrastiveConnectorConfig:
        if self.loss == "softmax" and self.bias_init is not None:
            raise ValueError("bias_init: has no effect on a softmax; set it to null or use loss=sigmoid")
        if self.first_scale > self.max_scale or math.isinf(self.max_scale):
            raise ValueError(
                f"max_scale={self.max_scale:g}: must be finite and at least scale_init={self.first_scale:g}"
            )
        return self

    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> ContrastiveConnector:
        return ContrastiveConnector(self, vision.feature_dim, decoder.hidden_dim)

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        if not vision.learns:
            raise ValueError(f"vision.kind={vision.kind}: has no parameters to train on pairs; use kind=transformer")
        if vision.tiles is not None:
            raise ValueError("vision.tiles: a pair has one crop of its image; leave tiles to a later stage")
        if vision.class_feature != (self.pool == "class"):
            need = "needs the class token" if self.pool == "class" else "takes only patches"
            raise ValueError(
                f"connector.pool={self.pool}: {need}; set vision.class_feature={str(not vision.class_feature).lower()}"
            )
        if decoder.tie_embeddings or decoder.predicted_rows:
            name = "tie_embeddings" if decoder.tie_embeddings else "extra_tokens.predicted"
            raise ValueError(f"decoder.{name}: a contrastive model predicts no tokens and has no head; set it to false")
        if decoder.image_tokens is not None:
            raise ValueError("decoder.image_tokens: a contrastive model draws no images; set it to null")
        for key, rate in (("dropout", decoder.dropout), ("attention_dropout", decoder.attention_dropout)):
            if rate:
                raise ValueError(
                    f"decoder.{key}={rate:g}: a contrastive step may compute its vectors twice, and they must be "
                    "equal; set it to 0"
                )
        if isinstance(decoder.mlp, MoeConfig):
            raise ValueError("decoder.mlp.kind=moe: a contrastive loss does not include router losses; use dense")

    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        return {"pairs": len(batch.pairs)}

    def products(self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]) -> list[Product]:
        learns, towers = "connector" in trained, "vision" in trained
        text = not {"decoder", "extra_tokens"}.isdisjoint(trained)
        return [
            linear_product("pairs", 2 * vision.feature_dim * self.dim, weights=learns, inputs=towers),
            linear_product("pairs", 2 * decoder.hidden_dim * self.dim, weights=learns, inputs=text),
        ]


@dataclass(frozen=True)
class PairVectors:
    """Vectors of K pairs, and the learned parameters of a contrastive loss.

    Attributes:
        images: float32 ``(K, C)``, rows of norm 1.
        texts: float32 ``(K, C)``, rows of norm 1.
        log_scale: float32 ``()``, logarithm of the factor on similarities. Not clamped: it may exceed its limit.
        bias: float32 ``()``, bias on similarities; None with ``loss=softmax``.
    """

    images: Tensor
    texts: Tensor
    log_scale: Tensor
    bias: Tensor | None


class ContrastiveConnector(nn.Module):
    """Projects one feature of each image and text of a pair to vectors of norm 1.

    Args:
        config: Pooling, channels, and initial scale and bias.
        feature_dim: Channels of the tower's features.
        dim: Width D of the decoder.

    Source: CLIP (arXiv 2103.00020), figure 3; SigLIP (arXiv 2303.15343), algorithm 1.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, config: ContrastiveConnectorConfig, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.dim, self.pool = config.dim, config.pool
        self.visual_projection = nn.Linear(feature_dim, config.dim, bias=False)
        self.text_projection = nn.Linear(dim, config.dim, bias=False)
        self.constant_init = {"logit_scale": math.log(config.first_scale)}
        self.logit_scale = nn.Parameter(torch.empty(1))  # DeepSpeed does not support 0-d parameters.
        bias = config.first_bias
        if bias is not None:
            self.constant_init["logit_bias"] = bias
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.empty(1)))

    def forward(
        self,
        features: Float[Tensor, "F_rows feature_dim"],
        hidden: Float[Tensor, "T D"],
        media: MediaBlock,
        segments: Segments,
        pairs: Int[Tensor, "K 2"],
    ) -> PairVectors:
        """Return the vectors of the pairs.

        Args:
            features: Output of the tower, item after item. With ``pool=class``, each crop begins with its class token.
            hidden: Output of the decoder, after its final norm.
            media: The items.
            segments: The texts.
            pairs: Indices (item, segment) of each pair; may be empty.
        """
        items, texts = pairs.unbind(1)
        images = self._pooled(features, media).index_select(0, items)
        ends = segments.cu[1:].long().index_select(0, texts) - 1
        return PairVectors(
            F.normalize(self.visual_projection(images).float(), dim=-1),
            F.normalize(self.text_projection(hidden.index_select(0, ends)).float(), dim=-1),
            self.logit_scale.float().squeeze(0),
            None if self.logit_bias is None else self.logit_bias.float().squeeze(0),
        )

    def _pooled(self, features: Tensor, media: MediaBlock) -> Tensor:
        """Return one feature per item, ``(N, feature_dim)``."""
        if self.pool == "class":
            # All crops have the same number of rows: a class token requires positions of one fixed grid.
            rows_per_crop = len(features) // len(media.grids)
            return features.view(len(media.grids), rows_per_crop, -1)[:, 0]
        lengths = media.items.cu.diff()
        owner = torch.arange(len(lengths), device=features.device).repeat_interleave(lengths, output_size=len(features))
        sums = features.new_zeros(len(lengths), features.shape[1], dtype=torch.float32)
        return (sums.index_add(0, owner, features.float()) / lengths.unsqueeze(1)).to(features.dtype)
