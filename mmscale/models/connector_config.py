"""The kinds of connectors. To add a kind, add a file in ``connectors/`` and a name in the union below.

``projector_config.py`` lists the kinds of projectors, which connectors use.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmscale.models.connectors.contrastive import ContrastiveConnectorConfig
from mmscale.models.connectors.cross_attention import CrossAttentionConnectorConfig, HybridConnectorConfig
from mmscale.models.connectors.embedding import EmbeddingConnectorConfig
from mmscale.models.projector_config import (
    AttentionPoolConfig,
    CAbstractorConfig,
    ConvPoolConfig,
    LinearProjectorConfig,
    MeanPoolConfig,
    MlpProjectorConfig,
    ProjectorConfig,
    ResamplerConfig,
)

__all__ = [
    "AttentionPoolConfig",
    "CAbstractorConfig",
    "ConnectorConfig",
    "ContrastiveConnectorConfig",
    "ConvPoolConfig",
    "CrossAttentionConnectorConfig",
    "EmbeddingConnectorConfig",
    "HybridConnectorConfig",
    "LinearProjectorConfig",
    "MeanPoolConfig",
    "MlpProjectorConfig",
    "ProjectorConfig",
    "ResamplerConfig",
]

ConnectorConfig = Annotated[
    EmbeddingConnectorConfig | CrossAttentionConnectorConfig | HybridConnectorConfig | ContrastiveConnectorConfig,
    Field(discriminator="kind"),
]
