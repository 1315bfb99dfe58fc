"""What stands for an image and for a text, in one space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.connector_config import ContrastiveConnectorConfig


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

    def blocks_to_recompute(self) -> list[nn.Module]:
        """None: it has no blocks."""
        return []
