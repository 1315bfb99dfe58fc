"""The embedding connector: image features replace the embeddings of placeholder tokens, or are added to them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from data_pipeline.batch import MediaBlock, Segments
from data_pipeline.media_spec import Placement
from mmscale.models.connectors.connector import Connector, FeatureConnectorBase
from mmscale.models.connectors.padding import PaddingEmbedding
from mmscale.models.connectors.projector import MlpProjectorConfig
from mmscale.models.decoder import CrossAttentionHooks, DecoderConfig
from mmscale.models.kv_cache import KVCache
from mmscale.models.projector_config import ProjectorConfig
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend


class EmbeddingConnectorConfig(FeatureConnectorBase):
    """Image features replace the embeddings of placeholders (LLaVA, Qwen2-VL, NVLM-D), or are added to them (Molmo)."""

    placement: ClassVar[Placement] = Placement.EMBEDDING
    kind: Literal["embedding"] = "embedding"
    projector: ProjectorConfig = MlpProjectorConfig()
    """From tower features to the decoder's width."""
    combine: Literal["replace", "add"] = "replace"
    """``replace`` the embeddings of placeholders by features, or ``add`` features to them."""
    padding: bool = False
    """Add learned vectors to the features of patches with padding: one for patches that are all padding, another for
    those that are partly padding (Molmo)."""

    @property
    def learns_before_projector(self) -> bool:
        return self.padding

    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> EmbeddingConnector:
        return EmbeddingConnector(self, vision.feature_dim, decoder.hidden_dim)

    def media_needs(self) -> dict[str, Any]:
        return {**super().media_needs(), "padding": self.padding}


def write_features(
    hidden: Float[Tensor, "T D"], features: Float[Tensor, "F_rows D"], media: MediaBlock
) -> Float[Tensor, "T D"]:
    """Return ``hidden`` with rows ``media.scatter_index`` replaced by feature rows ``media.gather_index``."""
    return hidden.index_copy(0, media.scatter_index, features.index_select(0, media.gather_index).to(hidden.dtype))


def add_features(
    hidden: Float[Tensor, "T D"], features: Float[Tensor, "F_rows D"], media: MediaBlock
) -> Float[Tensor, "T D"]:
    """Return ``hidden`` with feature rows ``media.gather_index`` added to rows ``media.scatter_index``.

    Each row occurs at most once in ``scatter_index``, so the result does not depend on the order of the additions.
    """
    return hidden.index_add(0, media.scatter_index, features.index_select(0, media.gather_index).to(hidden.dtype))


class EmbeddingConnector(Connector):
    """Projects the features and writes each over its placeholder's embedding, or adds it.

    Source: LLaVA (arXiv 2304.08485), section 4.1; Molmo (arXiv 2409.17146) and its code, olmo/model.py, for adding.
    """

    def __init__(self, config: EmbeddingConnectorConfig, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.padding = PaddingEmbedding(feature_dim) if config.padding else None
        self.projector = config.projector.build(feature_dim, dim)
        self.combine = add_features if config.combine == "add" else write_features

    def connect(
        self,
        hidden: Tensor,
        features: Tensor,
        tags: Tensor,
        media: MediaBlock,
        segments: Segments,
        cache: KVCache | None,
    ) -> tuple[Tensor, CrossAttentionHooks | None]:
        """See ``Connector``. There is no cross-attention."""
        if self.padding is not None:
            features = self.padding(features, media)
        return self.combine(hidden, self.projector(features, media.grids), media), None
