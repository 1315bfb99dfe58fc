"""Image features in the place of token embeddings, or added to them."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.connector_config import (
    AttentionPoolConfig,
    CAbstractorConfig,
    EmbeddingConnectorConfig,
    ProjectorConfig,
)
from mmscale.models.connectors.attention_pool import AttentionPool
from mmscale.models.connectors.c_abstractor import CAbstractor
from mmscale.models.connectors.padding import PaddingEmbedding
from mmscale.models.connectors.projector import Projector
from mmscale.models.decoder import Insertion
from mmscale.models.kv_cache import KVCache


def write_features(
    hidden: Float[Tensor, "T D"], features: Float[Tensor, "F_rows D"], media: MediaBlock
) -> Float[Tensor, "T D"]:
    """``hidden`` with rows ``media.dest`` replaced by feature rows ``media.source``."""
    return hidden.index_copy(0, media.dest, features.index_select(0, media.source).to(hidden.dtype))


def add_features(
    hidden: Float[Tensor, "T D"], features: Float[Tensor, "F_rows D"], media: MediaBlock
) -> Float[Tensor, "T D"]:
    """``hidden`` with feature rows ``media.source`` added to rows ``media.dest``, each of which occurs once."""
    return hidden.index_add(0, media.dest, features.index_select(0, media.source).to(hidden.dtype))


def build_projector(feature_dim: int, dim: int, config: ProjectorConfig) -> Projector | AttentionPool | CAbstractor:
    """From tower features, row by row, square by square or view by view, to the decoder's width."""
    if isinstance(config, AttentionPoolConfig):
        return AttentionPool(feature_dim, dim, config)
    if isinstance(config, CAbstractorConfig):
        return CAbstractor(feature_dim, dim, config)
    return Projector(feature_dim, dim, config)


class EmbeddingConnector(nn.Module):
    """Projects every feature and writes it into its token slot, or adds it to what is there.

    Source: LLaVA (arXiv 2304.08485), section 4.1; Molmo (arXiv 2409.17146) and its code, olmo/model.py, for adding.
    """

    def __init__(self, config: EmbeddingConnectorConfig, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.padding = PaddingEmbedding(feature_dim) if config.padding else None
        self.projector = build_projector(feature_dim, dim, config.projector)
        self.combine = add_features if config.combine == "add" else write_features

    def connect(
        self,
        hidden: Tensor,
        features: Tensor,
        tags: Tensor,
        media: MediaBlock,
        segments: Segments,
        cache: KVCache | None,
    ) -> tuple[Tensor, Mapping[int, Insertion]]:
        """The decoder's input with images in it; no insertions."""
        if self.padding is not None:
            features = self.padding(features, media)
        return self.combine(hidden, self.projector(features, media.grids), media), {}

    def resume(self, cache: KVCache, segments: Segments) -> Mapping[int, Insertion]:
        """While decoding, images are rows of the decoder's own cache."""
        return {}

    def blocks_to_recompute(self) -> list[nn.Module]:
        return []
