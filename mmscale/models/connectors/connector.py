"""What every kind of connector states about itself, and what its module does in a model that predicts tokens.

A connector kind is a configuration class and a module in one file. ``models/connector_config.py`` lists the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Placement
from mmscale.models.connectors.unseen_text import num_absent_rows
from mmscale.models.decoder import CrossAttended, DecoderConfig
from mmscale.models.kv_cache import KVCache
from mmscale.models.projector_config import ProjectorConfig, check_projector, projector_products, typical_view
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product


class ConnectorBase(StrictConfig, ABC):
    """A kind of connector. A kind has a field ``kind``."""

    placement: ClassVar[Placement]
    """Where the features of an image go."""
    predicts_tokens: ClassVar[bool] = True
    """Whether the model has a head for tokens. If not, it compares images with texts (``models/contrastive.py``)."""
    training_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that decide how training begins or is limited, and nothing that trained weights compute."""

    @abstractmethod
    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> nn.Module:
        """Return the module: a ``Connector`` if the model predicts tokens."""

    @abstractmethod
    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        """Raise ``ValueError`` if the connector does not fit between these two."""

    @abstractmethod
    def products(self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]) -> list[Product]:
        """Operations outside of the decoder's stream, while the components ``trained`` learn."""

    @abstractmethod
    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        """What the connector's operations over ``batch`` are proportional to."""

    @property
    def looks_ahead(self) -> bool:
        """Whether the tower must also return features of absent tiles."""
        return False

    def typical_view(self, vision: AnyVisionConfig) -> dict[str, int]:
        """Counts of one typical view, for the cost of a patch, ``feature_patches`` among them."""
        return {"feature_patches": 1}

    def media_needs(self) -> dict[str, Any]:
        """Fields of ``MediaSpec`` that follow from the connector."""
        return {"placement": self.placement}

    def block_layers(self, decoder: DecoderConfig) -> list[int]:
        """0-based decoder blocks that have a block of the connector before them."""
        return []

    def block_products(self, decoder: DecoderConfig, trained: Collection[str], flows: bool) -> list[Product]:
        """Operations of one such block; ``flows``: whether the stream that enters it needs a gradient."""
        return []


class FeatureConnectorBase(ConnectorBase):
    """A connector whose projector makes rows of the decoder's width from the tower's features."""

    if TYPE_CHECKING:  # Each kind declares the field: its place among the fields is that in a written configuration.
        projector: ProjectorConfig

    @property
    def learns_before_projector(self) -> bool:
        """Whether the connector has parameters before the projector."""
        return False

    @property
    def takes_class_feature(self) -> bool:
        """Whether a view may have the feature of its class token before those of its patches."""
        return False

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        check_projector(self.projector, vision.fixed_grid)
        if vision.class_feature and not self.takes_class_feature:
            raise ValueError(
                "vision.class_feature: has no place among embedded or merged patches; use connector.kind="
                "cross_attention with projector.merge=1"
            )

    def media_needs(self) -> dict[str, Any]:
        projector = self.projector
        return {**super().media_needs(), "merge": projector.merge, "pooled_side": projector.pooled_side}

    def products(self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]) -> list[Product]:
        return projector_products(
            self.projector,
            vision.feature_dim,
            decoder.hidden_dim,
            learns="connector" in trained,
            tower_learns="vision" in trained,
            learns_before=self.learns_before_projector,
        )

    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        media, merge = batch.media["image"], self.projector.merge
        frames = sum(time for time, _, _ in media.grids)
        patches = media.items.total + int(vision.class_feature) * frames
        if self.looks_ahead:
            patches += sum(num_absent_rows(media, vision, merge))
        return {
            "feature_patches": patches,
            "pooled_pairs": patches,
            "features": patches // merge**2,
            "frames": frames,
        }

    def typical_view(self, vision: AnyVisionConfig) -> dict[str, int]:
        patches, features = typical_view(self.projector, vision.fixed_grid)
        return {"feature_patches": patches, "features": features, "frames": 1, "attended_rows": features}


class Connector(nn.Module, ABC):
    """The module of a connector in a model that predicts tokens."""

    @abstractmethod
    def connect(
        self,
        hidden: Tensor,
        features: Tensor,
        tags: Tensor,
        media: MediaBlock,
        segments: Segments,
        cache: KVCache | None,
    ) -> tuple[Tensor, CrossAttended | None]:
        """Join an image's features to the text.

        Args:
            hidden: Embedded tokens ``(T, D)``.
            features: Rows of the tower ``(P, feature_dim)``.
            tags: Embedded tags of tiles ``(tags, D)``.
            media: The items of the batch and where their features go.
            segments: Documents.
            cache: Filled for ``resume`` if text is generated; else None.

        Returns:
            The decoder's input, and cross-attention that runs before some of its blocks, if there is any.
        """

    def resume(self, cache: KVCache, segments: Segments) -> CrossAttended | None:
        """Cross-attention of rows that continue cached sequences, if there is any."""
        return None

    def blocks_to_recompute(self) -> list[nn.Module]:
        """Blocks worth recomputing in the backward pass."""
        return []
