"""What stands for an image and for a text, in one space."""

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
from mmscale.nn.flops import Product, linear
from mmscale.nn.moe import MoeConfig
from mmscale.nn.sizes import Width


class ContrastiveConnectorConfig(ConnectorBase):
    """One vector of an image and one of its text, near each other (CLIP, SigLIP): the decoder is the text's tower."""

    placement: ClassVar[Placement] = Placement.PAIR
    predicts_tokens: ClassVar[bool] = False
    training_fields: ClassVar[tuple[str, ...]] = ("scale_init", "max_scale", "bias_init")
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

    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> ContrastiveConnector:
        return ContrastiveConnector(self, vision.feature_dim, decoder.hidden_dim)

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        if not vision.learns:
            raise ValueError(f"vision.kind={vision.kind}: has nothing to train by pairs; use kind=transformer")
        if vision.tiles is not None:
            raise ValueError("vision.tiles: a pair has one view of its image; leave tiles to a later stage")
        if vision.class_feature != (self.pool == "class"):
            wanted = "needs the class token" if self.pool == "class" else "takes patches alone"
            raise ValueError(
                f"connector.pool={self.pool}: {wanted}; set vision.class_feature="
                f"{str(not vision.class_feature).lower()}"
            )
        if decoder.tie_embeddings or decoder.predicted_rows:
            name = "tie_embeddings" if decoder.tie_embeddings else "extra_tokens.predicted"
            raise ValueError(f"decoder.{name}: a contrastive model predicts no token and has no head; set it to false")
        if decoder.dropout:
            raise ValueError(
                f"decoder.dropout={decoder.dropout:g}: a contrastive step may compute its vectors twice, which must be "
                "the same; set it to 0"
            )
        if isinstance(decoder.mlp, MoeConfig):
            raise ValueError("decoder.mlp.kind=moe: a contrastive loss has no place for those of routers; use dense")

    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        return {"pairs": len(batch.pairs)}

    def products(self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]) -> list[Product]:
        learns, towers = "connector" in trained, "vision" in trained
        text = not {"decoder", "extra_tokens"}.isdisjoint(trained)
        return [
            linear("pairs", 2 * vision.feature_dim * self.dim, weights=learns, inputs=towers),
            linear("pairs", 2 * decoder.hidden_dim * self.dim, weights=learns, inputs=text),
        ]


@dataclass(frozen=True)
class PairVectors:
    """What a contrastive loss compares.

    Attributes:
        images: float32 ``(K, C)``, each of length 1.
        texts: float32 ``(K, C)``, each of length 1.
        log_scale: float32 ``()``, logarithm of the factor on similarities, as it is learned: it may be past its limit.
        bias: float32 ``()``, added to them; None of a softmax.
    """

    images: Tensor
    texts: Tensor
    log_scale: Tensor
    bias: Tensor | None


class ContrastiveConnector(nn.Module):
    """Projects what stands for each image and each text of a pair, and scales both to length 1.

    Args:
        config: What to build.
        feature_dim: Of the tower.
        dim: D of the decoder.

    Source: CLIP (arXiv 2103.00020), figure 3; SigLIP (arXiv 2303.15343), algorithm 1.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, config: ContrastiveConnectorConfig, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.dim, self.pool = config.dim, config.pool
        self.visual_projection = nn.Linear(feature_dim, config.dim, bias=False)
        self.text_projection = nn.Linear(dim, config.dim, bias=False)
        self.constant_init = {"logit_scale": math.log(config.first_scale)}
        self.logit_scale = nn.Parameter(torch.empty(1))  # DeepSpeed takes no scalar.
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
        """Vectors of the pairs.

        Args:
            features: Of the tower, item after item, class rows included.
            hidden: Of the decoder, after its last norm.
            media: The items.
            segments: The texts.
            pairs: (item, segment); there may be none.
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
        """``(N, feature_dim)``: a row of each item."""
        if self.pool == "class":
            rows = len(media.grids), len(features) // len(media.grids)  # A class token knows views of one size alone.
            return features.view(*rows, -1)[:, 0]
        lengths = media.items.cu.diff()
        owner = torch.arange(len(lengths), device=features.device).repeat_interleave(lengths, output_size=len(features))
        sums = features.new_zeros(len(lengths), features.shape[1], dtype=torch.float32)
        return (sums.index_add(0, owner, features.float()) / lengths.unsqueeze(1)).to(features.dtype)
