"""Builds a model from its configuration, counts its parameters, and derives its ``MediaSpec``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, overload

import torch
from torch import nn

from data_pipeline.media_spec import MediaSpec
from mmscale.models.adapters import attach_adapters
from mmscale.models.config import AnyModelConfig, AudioTowerConfig, ModelConfig, TokenizerConfig, TowerConfig
from mmscale.models.connectors.connector import Connector
from mmscale.models.connectors.contrastive import ContrastiveConnector
from mmscale.models.contrastive import ContrastiveModel
from mmscale.models.decoder import Decoder, DecoderConfig
from mmscale.models.flops import cost_per_patch, modality_cost
from mmscale.models.image_tokenizer import build_image_tokenizer
from mmscale.models.image_tokenizer_model import ImageTokenizerModel
from mmscale.models.image_tokens import ImageHead
from mmscale.models.multimodal import MultimodalModel
from mmscale.models.vocabulary import LanguageHead, TokenEmbedding
from mmscale.nn.attention_backends import AttentionChoice, Backend, resolve_backend
from mmscale.nn.experts import Experts
from mmscale.nn.init import initialise_

AnyModel = MultimodalModel | ContrastiveModel
TrainedModel = AnyModel | ImageTokenizerModel
"""A model that a run trains."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: All parameters; tied ones count once.
        active: Parameters that one token uses: A of the E routed experts count.
        components: Number per component of the model: "vision", "connector", "video_connector", "audio",
            "audio_connector", "decoder", "extra_tokens", "image_tokens", "image_tokenizer", "adapters"; of an image
            tokenizer alone "encoder", "codebook", "decoder", "discriminator".
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
    """Return a model on torch's current default device.

    Args:
        config: Architecture.
        attention: Attention kernel, or ``auto``.
        seed: Seed of the initial values, which depend only on the seed and on each parameter's name. None: the caller
            loads weights or calls ``mmscale.nn.init.initialise_``. Ignored on the meta device.
        dtype: Compute dtype; only used by ``attention="auto"``. None: torch's default dtype, which parameters have.

    Raises:
        UnsupportedError: this machine lacks the kernel named by ``attention``.
        ConfigError: a target of ``adapters`` matches no layer.
    """
    backend = resolve_backend(attention, dtype)
    decoder, vision, connector = Decoder(config.decoder, backend), None, None
    if config.vision is not None and config.connector is not None:
        vision = config.vision.build(backend, absent_features=config.connector.looks_ahead)
        connector = config.connector.build(config.vision, config.decoder, backend)
    model: AnyModel
    if isinstance(connector, ContrastiveConnector):
        assert vision is not None
        model = ContrastiveModel(config, decoder, vision, connector)
    else:
        assert connector is None or isinstance(connector, Connector)
        tied = decoder.embed_tokens if config.decoder.tie_embeddings else None
        head = _head(config.decoder, tied)
        tokenizer = None if config.image_tokenizer is None else build_image_tokenizer(config.image_tokenizer)
        modalities: dict[str, Any] = {
            name: each.build(backend, config.decoder.hidden_dim) for name, each in config.modalities.items()
        }
        model = MultimodalModel(config, decoder, head, vision, connector, tokenizer, modalities)
    if config.adapters is not None:
        attach_adapters(model, config.adapters)
    if seed is not None and not any(parameter.is_meta for parameter in model.parameters()):
        initialise_(model, seed)
    return model


def _head(config: DecoderConfig, tied: TokenEmbedding | None) -> LanguageHead:
    tokens = config.separate_image_tokens
    image = None if tokens is None else ImageHead(tokens, config.hidden_dim)
    head = LanguageHead(config.vocab_size, config.hidden_dim, tied, config.predicted_rows, image, config.num_ids)
    for module in head.modules():
        module.init_std = config.init_std  # type: ignore[assignment]
    return head


class TowerAlone(nn.Module):
    """A vision or audio tower without a decoder. Its parameters have the same names as in a whole model."""

    def __init__(self, config: TowerConfig | AudioTowerConfig, backend: Backend) -> None:
        super().__init__()
        self.config = config
        if isinstance(config, AudioTowerConfig):
            self.audio = config.audio.tower.build(backend)
        else:
            self.vision = config.vision.build(backend)

    def components(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of the one component, ``vision`` or ``audio``."""
        return {name: list(tower.parameters()) for name, tower in self.named_children()}


@overload
def build_unset(
    config: ModelConfig | TokenizerConfig, *, attention: AttentionChoice = "auto", dtype: torch.dtype | None = None
) -> TrainedModel: ...
@overload
def build_unset(
    config: AnyModelConfig, *, attention: AttentionChoice = "auto", dtype: torch.dtype | None = None
) -> TrainedModel | TowerAlone: ...
def build_unset(
    config: AnyModelConfig, *, attention: AttentionChoice = "auto", dtype: torch.dtype | None = None
) -> TrainedModel | TowerAlone:
    """Return a model, a tower or an image tokenizer on torch's current default device, without calling ``initialise_``.

    The caller must load weights into it: until then its values are meaningless.

    Args:
        config: Architecture.
        attention: As for ``build_model``.
        dtype: As for ``build_model``.

    Raises:
        UnsupportedError: this machine lacks the kernel named by ``attention``.
    """
    if isinstance(config, TokenizerConfig):
        return ImageTokenizerModel(config)
    if isinstance(config, TowerConfig | AudioTowerConfig):
        return TowerAlone(config, resolve_backend(attention, dtype))
    return build_model(config, attention=attention, seed=None, dtype=dtype)


def build_weights(config: AnyModelConfig) -> TrainedModel | TowerAlone:
    """Return a model, a tower or an image tokenizer on the meta device: parameter names and shapes without values."""
    with torch.device("meta"):
        return build_unset(config, attention="sdpa")


@lru_cache(maxsize=64)
def check_adapters(config: ModelConfig | TokenizerConfig) -> None:
    """Check that each target of ``adapters`` matches a layer. Builds the model on the meta device if it has adapters.

    Raises:
        ConfigError: a target matches no layer.
    """
    if config.adapters is not None:
        build_weights(config)


def media_spec(config: ModelConfig | TokenizerConfig, *, encodes: bool = False) -> MediaSpec:
    """Return the properties of a model that the data pipeline needs.

    Args:
        config: Architecture.
        encodes: Whether the model encodes images as tokens in each step, if it has an image tokenizer.
    """
    if isinstance(config, TokenizerConfig):
        return MediaSpec(**config.media_needs())
    tokenizer = config.image_tokenizer if encodes else None
    code_size = None if tokenizer is None else tokenizer.stride
    modalities: dict[str, Any] = {
        name: each.spec(modality_cost(config, name)) for name, each in config.modalities.items()
    }
    if config.vision is None or config.connector is None:
        return MediaSpec(**config.decoder.media_needs(), code_size=code_size, **modalities)
    spec = MediaSpec(
        **config.decoder.media_needs(),
        code_size=code_size,
        **config.vision.media_needs(),
        **config.connector.media_needs(),
        cost_per_patch=cost_per_patch(config),
        **modalities,
    )
    videos = config.connector.video_needs()
    if videos is None:
        return spec
    without_others: dict[str, Any] = dict.fromkeys(modalities)
    return replace(spec, videos=replace(spec, **videos, **without_others))


def count_parameters(config: AnyModelConfig) -> ParameterCount:
    """Count the parameters of a model, a tower or an image tokenizer.

    Builds it on the meta device, without memory for its values.
    """
    return count_built(build_weights(config))


def count_built(model: TrainedModel | TowerAlone) -> ParameterCount:
    """Count the parameters of a model that is built already; none of them may be sharded."""
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
