"""From a configuration to a model: the one place where kinds become classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from data_pipeline.media_spec import MediaSpec, Placement
from mmscale.models.config import AnyModelConfig, ModelConfig, TowerConfig
from mmscale.models.connector_config import (
    CAbstractorConfig,
    ContrastiveConnectorConfig,
    CrossAttentionConnectorConfig,
    EmbeddingConnectorConfig,
    HybridConnectorConfig,
    SeeingConnectorConfig,
)
from mmscale.models.connectors.contrastive import ContrastiveConnector
from mmscale.models.connectors.cross_attention import CrossAttentionConnector
from mmscale.models.connectors.embedding import EmbeddingConnector
from mmscale.models.connectors.unseen_text import absent_features
from mmscale.models.contrastive import ContrastiveModel
from mmscale.models.decoder import Decoder
from mmscale.models.flops import cost_per_patch
from mmscale.models.head import LanguageHead
from mmscale.models.multimodal import Connector, MultimodalModel
from mmscale.models.vision import PixelPatches, VisionTower
from mmscale.models.vision_config import PatchesConfig
from mmscale.nn.attention_backends import AttentionChoice, Backend, resolve_backend
from mmscale.nn.init import initialise_
from mmscale.nn.moe import Experts

AnyModel = MultimodalModel | ContrastiveModel


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: All, tied ones once.
        active: Those that one token uses: of E routed experts only A count.
        components: Totals of "vision", "connector", "decoder" and "extra_tokens", those that there are.
    """

    total: int
    active: int
    components: dict[str, int]


def build_model(
    config: ModelConfig,
    *,
    attention: AttentionChoice = "auto",
    seed: int | None = 0,
    dtype: torch.dtype | None = None,
) -> AnyModel:
    """Builds a model on the current default device.

    Args:
        config: What to build.
        attention: Kernel; a named one that is missing raises.
        seed: Of the first values, which depend on it and on each parameter's name alone. None leaves them unset, for
            a caller that loads weights or calls ``mmscale.nn.init.initialise_`` later. Unused on the meta device.
        dtype: Compute dtype, if known, for the choice of kernel by ``auto``; parameters keep torch's default dtype.

    Raises:
        UnsupportedError: this machine lacks the kernel named by ``attention``.
    """
    backend = resolve_backend(attention, dtype)
    decoder = Decoder(config.decoder, backend)
    vision = _tower(config, backend)
    model: AnyModel
    if isinstance(config.connector, ContrastiveConnectorConfig):
        assert isinstance(vision, VisionTower), "validated"
        connector = ContrastiveConnector(config.connector, vision.config.feature_dim, config.decoder.hidden_dim)
        model = ContrastiveModel(config, decoder, vision, connector)
    else:
        head = _head(config, decoder)
        model = MultimodalModel(config, decoder, head, vision, _connector(config, config.connector, backend))
    if seed is not None and not any(parameter.is_meta for parameter in model.parameters()):
        initialise_(model, seed)
    return model


def _tower(config: ModelConfig, backend: Backend) -> VisionTower | PixelPatches | None:
    if config.vision is None:
        return None
    if isinstance(config.vision, PatchesConfig):
        return PixelPatches(config.vision)
    return VisionTower(config.vision, backend, absent_features=absent_features(config))


def _head(config: ModelConfig, decoder: Decoder) -> LanguageHead:
    tied = decoder.embed_tokens if config.decoder.tie_embeddings else None
    head = LanguageHead(config.decoder.vocab_size, config.decoder.hidden_dim, tied, config.decoder.predicted_rows)
    head.init_std = config.decoder.init_std  # type: ignore[assignment]
    return head


def _connector(config: ModelConfig, connector: SeeingConnectorConfig | None, backend: Backend) -> Connector | None:
    if config.vision is None or connector is None:
        return None
    if isinstance(connector, EmbeddingConnectorConfig):
        return EmbeddingConnector(connector, config.vision.feature_dim, config.decoder.hidden_dim)
    return CrossAttentionConnector(connector, config.vision, config.decoder, backend)


class TowerAlone(nn.Module):
    """A vision tower whose parameters have the names that they have in a model."""

    def __init__(self, config: TowerConfig, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision, backend)

    def components(self) -> dict[str, list[nn.Parameter]]:
        """One component."""
        return {"vision": list(self.vision.parameters())}


def build_unset(
    config: AnyModelConfig, *, attention: AttentionChoice = "auto", dtype: torch.dtype | None = None
) -> AnyModel | TowerAlone:
    """A model or a tower on the current default device, for a caller that loads weights.

    Args:
        config: What to build.
        attention: As for ``build_model``.
        dtype: As for ``build_model``.

    Raises:
        UnsupportedError: this machine lacks the kernel named by ``attention``.
    """
    if isinstance(config, TowerConfig):
        return TowerAlone(config, resolve_backend(attention, dtype))
    return build_model(config, attention=attention, seed=None, dtype=dtype)


def build_weights(config: AnyModelConfig) -> AnyModel | TowerAlone:
    """On the meta device: names and shapes, no values."""
    with torch.device("meta"):
        return build_unset(config, attention="sdpa")


def media_spec(config: ModelConfig) -> MediaSpec:
    """What the data side must know of a model."""
    axes = 1 if config.decoder.rope is None or config.decoder.rope.sections is None else 3
    longest = config.decoder.learned_positions
    if config.vision is None or config.connector is None:
        return MediaSpec(placement=Placement.NONE, position_axes=axes, max_document_tokens=longest)
    placements = {
        EmbeddingConnectorConfig: Placement.EMBEDDING,
        CrossAttentionConnectorConfig: Placement.CROSS_ATTENTION,
        HybridConnectorConfig: Placement.HYBRID,
        ContrastiveConnectorConfig: Placement.PAIR,
    }
    projector = None if isinstance(config.connector, ContrastiveConnectorConfig) else config.connector.projector
    return MediaSpec(
        placement=placements[type(config.connector)],
        patch_size=config.vision.patch_size,
        merge=1 if projector is None else projector.merge,
        channels=config.vision.channels,
        cost_per_patch=cost_per_patch(config),
        fixed_grid=config.vision.fixed_grid,
        position_axes=axes,
        max_document_tokens=longest,
        class_features=int(config.vision.class_feature),
        max_tiles=None if config.vision.tiles is None else config.vision.tiles.max_tiles,
        computes_absent=config.vision.tiles is not None and config.vision.tiles.attend_absent,
        padding=isinstance(config.connector, EmbeddingConnectorConfig) and config.connector.padding,
        pooled_side=projector.side if isinstance(projector, CAbstractorConfig) else None,
    )


def count_parameters(config: AnyModelConfig) -> ParameterCount:
    """Counts on the meta device: no memory, any size."""
    model = build_weights(config)
    total = _unique(model)
    idle = 0
    for module in model.modules():
        if isinstance(module, Experts):
            idle += _unique(module) - _unique(module) * module.experts_per_token // module.num_experts
    components = {
        name: sum(parameter.numel() for parameter in set(parameters)) for name, parameters in model.components().items()
    }
    return ParameterCount(total, total - idle, components)


def _unique(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
