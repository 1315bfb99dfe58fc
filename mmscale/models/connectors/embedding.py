"""Image features in the place of token embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, Segments
from mmscale.models.config import CAbstractorConfig, EmbeddingConnectorConfig, ProjectorConfig
from mmscale.models.connectors.c_abstractor import CAbstractor
from mmscale.models.connectors.projector import Projector
from mmscale.models.decoder import Insertion
from mmscale.models.kv_cache import KVCache


def write_features(
    hidden: Float[Tensor, "T D"], features: Float[Tensor, "F_rows D"], media: MediaBlock
) -> Float[Tensor, "T D"]:
    """``hidden`` with rows ``media.dest`` replaced by feature rows ``media.source``."""
    return hidden.index_copy(0, media.dest, features.index_select(0, media.source).to(hidden.dtype))


def build_projector(feature_dim: int, dim: int, config: ProjectorConfig) -> Projector | CAbstractor:
    """From tower features to the decoder's width."""
    kind = CAbstractor if isinstance(config, CAbstractorConfig) else Projector
    return kind(feature_dim, dim, config)  # type: ignore[arg-type]


class EmbeddingConnector(nn.Module):
    """Projects every feature and writes it into its token slot.

    Source: LLaVA (arXiv 2304.08485), section 4.1.
    """

    def __init__(self, config: EmbeddingConnectorConfig, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.projector = build_projector(feature_dim, dim, config.projector)

    def connect(
        self, hidden: Tensor, features: Tensor, media: MediaBlock, segments: Segments, cache: KVCache | None
    ) -> tuple[Tensor, Mapping[int, Insertion]]:
        """The decoder's input with images in it; no insertions."""
        return write_features(hidden, self.projector(features, media.grids), media), {}

    def resume(self, cache: KVCache, segments: Segments) -> Mapping[int, Insertion]:
        """While decoding, images are rows of the decoder's own cache."""
        return {}

    def blocks_to_recompute(self) -> list[nn.Module]:
        return []
