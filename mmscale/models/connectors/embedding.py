"""The embedding connector: image features replace the embeddings of placeholder tokens, or are added to them."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.media_spec import Grid, MediaSpec, Placement
from mmscale.models.connectors.connector import Connector, FeatureConnectorBase, feature_needs, projector_counts
from mmscale.models.connectors.padding import PaddingEmbedding
from mmscale.models.connectors.projector import MlpProjectorConfig
from mmscale.models.decoder import CrossAttentionHooks, DecoderConfig
from mmscale.models.kv_cache import KVCache
from mmscale.models.projector_config import ProjectorConfig, check_projector, projector_products
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product
from mmscale.nn.host import to_device


class EmbeddingConnectorConfig(FeatureConnectorBase):
    """Image features replace the embeddings of placeholders (LLaVA, Qwen2-VL, NVLM-D), or are added to them (Molmo)."""

    placement: ClassVar[Placement] = Placement.EMBEDDING
    kind: Literal["embedding"] = "embedding"
    projector: ProjectorConfig = MlpProjectorConfig()
    """From tower features to the decoder's width."""
    video_projector: ProjectorConfig | None = None
    """From tower features of videos to the decoder's width (Baichuan-Omni). It is a component of its own,
    ``video_connector``, so a stage can train it alone. null: ``projector`` projects videos too."""
    combine: Literal["replace", "add"] = "replace"
    """``replace`` the embeddings of placeholders by features, or ``add`` features to them."""
    padding: bool = False
    """Add learned vectors to the features of patches with padding: one for patches that are all padding, another for
    those that are partly padding (Molmo)."""

    @property
    def learns_before_projector(self) -> bool:
        return self.padding

    @property
    def components(self) -> tuple[str, ...]:
        return ("connector",) if self.video_projector is None else ("connector", "video_connector")

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        super().check(vision, decoder)
        if self.video_projector is None:
            return
        if self.padding:
            raise ValueError("connector.video_projector: frames of videos have no padding; set connector.padding=false")
        if vision.tiles is not None:
            raise ValueError("connector.video_projector: a tower with vision.tiles reads no videos; set it to null")
        try:
            check_projector(self.video_projector, vision.fixed_grid)
            self.video_projector.check_width(vision.feature_dim)
        except ValueError as error:
            raise ValueError(str(error).replace("connector.projector", "connector.video_projector")) from None

    def video_products(
        self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]
    ) -> list[Product]:
        if self.video_projector is None:
            return []
        learns, tower_learns = "video_connector" in trained, "vision" in trained
        found = projector_products(
            self.video_projector,
            vision.feature_dim,
            decoder.hidden_dim,
            learns=learns,
            tower_learns=tower_learns,
            learns_before=False,
        )
        return [each._replace(per=f"video.{each.per}") for each in found]

    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        if self.video_projector is None:
            return super().counts(vision, batch)
        images, videos = split_grids(batch.media["image"])
        counts = {**projector_counts(self.video_projector, videos), "passes": 1}
        return projector_counts(self.projector, images) | {f"video.{name}": count for name, count in counts.items()}

    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> EmbeddingConnector:
        return EmbeddingConnector(self, vision.feature_dim, decoder.hidden_dim)

    def media_needs(self) -> dict[str, Any]:
        return {**super().media_needs(), "padding": self.padding}

    def video_needs(self) -> dict[str, Any] | None:
        return None if self.video_projector is None else feature_needs(self.video_projector)


def split_grids(media: MediaBlock) -> tuple[list[Grid], list[Grid]]:
    """Return the grids of the items that are images, and of those that are videos."""
    both = list(zip(media.grids, (location.is_video for location in media.locations), strict=True))
    return [grid for grid, is_video in both if not is_video], [grid for grid, is_video in both if is_video]


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
        video = config.video_projector
        self.video_projector = None if video is None else video.build(feature_dim, dim)
        self.num_features = [
            MediaSpec(**feature_needs(each)).num_features for each in (config.projector, video) if each is not None
        ]
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
        return self.combine(hidden, self._projected(features, media), media), None

    def _projected(self, features: Float[Tensor, "P feature_dim"], media: MediaBlock) -> Float[Tensor, "F_rows D"]:
        """Return the features of all items in order, those of videos through their own projector if there is one.

        Both projectors run for every batch, which has an image and a video, because sharded ranks must run the same
        modules.
        """
        if self.video_projector is None:
            projected: Tensor = self.projector(features, media.grids)
            return projected
        flags = np.array([location.is_video for location in media.locations])
        is_video = np.repeat(flags, [math.prod(grid) for grid in media.grids])
        parts = list[Tensor]()
        for projector, rows, grids in zip(
            (self.projector, self.video_projector), (~is_video, is_video), split_grids(media), strict=True
        ):
            own = features.index_select(0, to_device(np.flatnonzero(rows), features.device))
            parts.append(projector(own, grids))
        # Images, then videos; ``place`` is the row of each feature of the items in order.
        counts = [self.num_features[int(flag)](grid) for flag, grid in zip(flags, media.grids, strict=True)]
        place = np.argsort(np.argsort(np.repeat(flags, counts), kind="stable"))
        return torch.cat(parts).index_select(0, to_device(place, features.device))

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of ``connector``, and of ``video_connector`` if videos have a projector."""
        if self.video_projector is None:
            return super().components()
        own = list(self.video_projector.parameters())
        names = {id(parameter) for parameter in own}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in names]
        return {"connector": rest, "video_connector": own}
