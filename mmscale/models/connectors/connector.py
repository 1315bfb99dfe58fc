"""Base classes of the kinds of connectors, and the interface of a connector's module.

A kind is a configuration class and a module in one file. ``models/connector_config.py`` lists the kinds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from data_pipeline.batch import MediaBlock, MultimodalBatch, Segments
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Grid, Placement, num_queries
from mmscale.models.connectors.lookahead import absent_tile_rows
from mmscale.models.connectors.projector import ProjectorBase
from mmscale.models.decoder import CrossAttentionHooks, DecoderConfig
from mmscale.models.kv_cache import KVCache
from mmscale.models.projector_config import ProjectorConfig, check_projector, projector_products, typical_crop
from mmscale.models.vision_config import AnyVisionConfig
from mmscale.nn.attention_backends import Backend
from mmscale.nn.flops import Product


class ConnectorBase(StrictConfig, ABC):
    """Base class of a connector's configuration. A subclass has a field ``kind``."""

    placement: ClassVar[Placement]
    """How the features of an image reach the decoder."""
    predicts_tokens: ClassVar[bool] = True
    """Whether the model predicts tokens. If not, it compares images with texts (``models/contrastive.py``)."""
    training_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that affect training only: initial values and limits, but nothing that a trained model computes."""

    @abstractmethod
    def build(self, vision: AnyVisionConfig, decoder: DecoderConfig, backend: Backend) -> nn.Module:
        """Return the module: a ``Connector`` if the model predicts tokens."""

    @abstractmethod
    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        """Raise ``ValueError`` if the connector does not fit the tower and the decoder."""

    @abstractmethod
    def products(self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]) -> list[Product]:
        """Return the connector's operations outside of its blocks, when the components ``trained`` are trained."""

    @abstractmethod
    def counts(self, vision: AnyVisionConfig, batch: MultimodalBatch) -> dict[str, int]:
        """Return the counts of ``batch`` that the connector's operations are proportional to."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the connector's components, as in ``Connector.components``."""
        return ("connector",)

    def video_products(
        self, vision: AnyVisionConfig, decoder: DecoderConfig, trained: Collection[str]
    ) -> list[Product]:
        """Return the operations of the component ``video_connector``."""
        return []

    def video_needs(self) -> dict[str, Any] | None:
        """Return the fields of ``MediaSpec.videos`` that differ from those of images; None if videos are as images."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether the tower must also return features of absent tiles."""
        return False

    def typical_crop(self, vision: AnyVisionConfig) -> dict[str, int]:
        """Return the counts of a typical crop, for the cost of a patch. Must contain ``feature_patches``."""
        return {"feature_patches": 1}

    def media_needs(self) -> dict[str, Any]:
        """Return the fields of ``MediaSpec`` that depend on the connector."""
        return {"placement": self.placement}

    def block_layers(self, decoder: DecoderConfig) -> list[int]:
        """Return the 0-based decoder blocks that have a block of the connector before them."""
        return []

    def block_products(self, decoder: DecoderConfig, trained: Collection[str], flows: bool) -> list[Product]:
        """Return the operations of one block of ``block_layers``; ``flows``: whether its token rows need a gradient."""
        return []


class FeatureConnectorBase(ConnectorBase):
    """Base class of connectors with a projector from the tower's features to the decoder's width."""

    if TYPE_CHECKING:  # Each kind declares the field itself, which determines its position in a written configuration.
        projector: ProjectorConfig

    @property
    def learns_before_projector(self) -> bool:
        """Whether the connector has parameters before the projector."""
        return False

    @property
    def accepts_class_feature(self) -> bool:
        """Whether ``vision.class_feature`` may be set."""
        return False

    def check(self, vision: AnyVisionConfig, decoder: DecoderConfig) -> None:
        check_projector(self.projector, vision.fixed_grid)
        self.projector.check_width(vision.feature_dim)
        if vision.class_feature and not self.accepts_class_feature:
            raise ValueError(
                "vision.class_feature: needs connector.kind=cross_attention and a projector of kind linear or mlp with "
                "projector.merge=1, because a class token is not part of the grid of patches"
            )
        if self.looks_ahead and (self.projector.pooling or self.projector.pooled_side or self.projector.query_sizes):
            raise ValueError(
                f"connector.unseen_text=looks_ahead: needs a projector of kind linear, mlp or attention_pool, not "
                f"{self.projector.kind}, because it attends to features of absent tiles; set it to silent"
            )

    def media_needs(self) -> dict[str, Any]:
        return {**super().media_needs(), **feature_needs(self.projector)}

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
        media = batch.media["image"]
        patches = int(vision.class_feature) * sum(time for time, _, _ in media.grids)
        if self.looks_ahead:
            patches += sum(absent_tile_rows(media, vision, self.projector.merge))
        return projector_counts(self.projector, media.grids, patches)

    def typical_crop(self, vision: AnyVisionConfig) -> dict[str, int]:
        patches, features = typical_crop(self.projector, vision.fixed_grid)
        pairs = patches * features if self.projector.query_sizes else 0
        counts = {"feature_patches": patches, "features": features, "query_pairs": pairs, "frames": 1}
        return {**counts, "attended_rows": features}


def feature_needs(projector: ProjectorBase) -> dict[str, Any]:
    """Return the fields of ``MediaSpec`` that determine the number of features."""
    return {
        "merge": projector.merge,
        "pooled_side": projector.pooled_side,
        "query_sizes": projector.query_sizes,
        "pooling": projector.pooling,
    }


def projector_counts(projector: ProjectorBase, grids: Sequence[Grid], more_patches: int = 0) -> dict[str, int]:
    """Return the counts that the operations of a projector over items of these grids are proportional to.

    ``more_patches`` is the number of its inputs that are no patches of the items.
    """
    patches = sum(map(math.prod, grids)) + more_patches
    counts = {
        "feature_patches": patches,
        "pooled_pairs": patches,
        "features": patches // projector.merge**2,
        "frames": sum(time for time, _, _ in grids),
    }
    if (pooling := projector.pooling) is not None:
        counts["features"] = sum(time * math.prod(pooling.features(*sides)) for time, *sides in grids)
    if sizes := projector.query_sizes:
        numbers = [(grid, num_queries(sizes, grid)) for grid in grids]
        counts["features"] = sum(grid[0] * number for grid, number in numbers)
        counts["query_pairs"] = sum(math.prod(grid) * number for grid, number in numbers)
    return counts


class Connector(nn.Module, ABC):
    """Base class of a connector's module in a model that predicts tokens."""

    @abstractmethod
    def connect(
        self,
        hidden: Tensor,
        features: Tensor,
        tags: Tensor,
        media: MediaBlock,
        segments: Segments,
        cache: KVCache | None,
    ) -> tuple[Tensor, CrossAttentionHooks | None]:
        """Pass the features of the images to the decoder.

        Args:
            hidden: Embedded tokens ``(T, D)``.
            features: Output of the tower ``(P, feature_dim)``.
            tags: Embedded tile tags ``(tags, D)``.
            media: The items of the batch, with the indices that assign their features to tokens.
            segments: Documents.
            cache: During generation, filled for ``resume``; else None.

        Returns:
            The decoder's input, and the cross-attention to run before some of its blocks, or None.
        """

    def resume(self, cache: KVCache, segments: Segments) -> CrossAttentionHooks | None:
        """Return the cross-attention of new rows of cached sequences, or None."""
        return None

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each component; every parameter belongs to exactly one."""
        return {"connector": list(self.parameters())}

    def blocks_to_recompute(self) -> list[nn.Module]:
        """Return the blocks that activation checkpointing recomputes in the backward pass."""
        return []
