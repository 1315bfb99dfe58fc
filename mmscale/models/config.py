"""Configuration of a model: a decoder, and with it a vision tower and a connector, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.models.connector_config import ConnectorConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import AnyVisionConfig, VisionConfig


class TowerConfig(StrictConfig):
    """A vision tower by itself: its weights can be counted, imported, exported, and taken into a model."""

    vision: VisionConfig
    """The tower."""


class ModelConfig(StrictConfig):
    """A multimodal model, or a text model if ``vision`` and ``connector`` are null."""

    decoder: DecoderConfig
    """The text decoder."""
    vision: AnyVisionConfig | None = None
    """The image tower: a ``transformer`` (the default kind), or ``patches`` as they are; null for a text model."""
    connector: ConnectorConfig | None = None
    """How image features reach the decoder; null for a text model."""

    @property
    def components(self) -> tuple[str, ...]:
        """What a stage can freeze and train by name: the keys of ``MultimodalModel.components()``."""
        tower = ("vision",) if self.vision is not None and self.vision.learns else ()
        towers = (*tower, "connector") if self.vision is not None else ()
        return (*towers, "decoder", *(("extra_tokens",) if self.decoder.extra_tokens else ()))

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model has logits of tokens; a contrastive model has none."""
        return self.connector is None or self.connector.predicts_tokens

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.vision is None) != (self.connector is None):
            raise ValueError("vision and connector: set both, or neither for a text model")
        if self.vision is not None and self.connector is not None:
            self.connector.check(self.vision, self.decoder)
        return self


AnyModelConfig = ModelConfig | TowerConfig


def read_model_config(values: Mapping[str, Any]) -> AnyModelConfig:
    """Of JSON values: a model where they have a decoder, else a tower.

    Raises:
        ValidationError: they are neither.
    """
    return (ModelConfig if "decoder" in values else TowerConfig).model_validate(values)
