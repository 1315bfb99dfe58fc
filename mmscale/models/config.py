"""Configuration of a model: a decoder, with or without a vision tower and a connector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.models.adapters import COMPONENT, AdaptersConfig
from mmscale.models.connector_config import ConnectorConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import AnyVisionConfig, VisionConfig


class TowerConfig(StrictConfig):
    """A vision tower without a decoder. Its weights can be counted, imported, exported, and loaded into a model."""

    vision: VisionConfig
    """The tower."""


class ModelConfig(StrictConfig):
    """A multimodal model, or a text model if ``vision`` and ``connector`` are null."""

    decoder: DecoderConfig
    """The text decoder."""
    vision: AnyVisionConfig | None = None
    """The image tower: ``kind: transformer`` (the default), or ``kind: patches`` to pass the normalised pixels of each
    patch to the connector. Null for a text model."""
    connector: ConnectorConfig | None = None
    """How image features reach the decoder. Null for a text model: set ``vision`` and ``connector`` together."""
    adapters: AdaptersConfig | None = None
    """Low-rank adapters on linear layers (LoRA, DoRA); null for none."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that a stage can train or freeze: the keys of the model's ``components()``."""
        tower = ("vision",) if self.vision is not None and self.vision.learns else ()
        towers = (*tower, "connector") if self.vision is not None else ()
        extra_tokens = ("extra_tokens",) if self.decoder.extra_tokens else ()
        return (*towers, "decoder", *extra_tokens, *((COMPONENT,) if self.adapters else ()))

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model computes token logits; a contrastive model does not."""
        return self.connector is None or self.connector.predicts_tokens

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if (self.vision is None) != (self.connector is None):
            raise ValueError("vision and connector: set both, or neither for a text model")
        if self.vision is not None and self.connector is not None:
            self.connector.check(self.vision, self.decoder)
        if self.adapters is not None and self.adapters.dropout and not self.predicts_tokens:
            raise ValueError(
                f"adapters.dropout={self.adapters.dropout:g}: a contrastive step may compute its vectors twice, and "
                "they must be equal; set it to 0"
            )
        return self


AnyModelConfig = ModelConfig | TowerConfig


def read_model_config(values: Mapping[str, Any]) -> AnyModelConfig:
    """Return the model that JSON values describe, or the tower if they have no ``decoder``.

    Raises:
        ValidationError: the values are not a valid model or tower.
    """
    return (ModelConfig if "decoder" in values else TowerConfig).model_validate(values)
