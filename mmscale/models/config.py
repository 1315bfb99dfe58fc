"""Configuration of a model: a decoder, with or without a vision tower and a connector."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Tag, model_validator

from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Placement
from mmscale.models.adapters import COMPONENT, AdaptersConfig
from mmscale.models.audio import AudioModalityConfig
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.connector_config import ConnectorConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.image_tokenizer import ImageTokenizerConfig
from mmscale.models.image_tokens import COMPONENT as IMAGE_TOKENS
from mmscale.models.image_tokens import TOKENIZER
from mmscale.models.modality import ModalityBase
from mmscale.models.vision_config import AnyVisionConfig, VisionConfig
from mmscale.nn.discriminator import PatchDiscriminatorConfig
from mmscale.nn.sizes import Side


class TowerConfig(StrictConfig):
    """A vision tower without a decoder. Its weights can be counted, imported, exported, and loaded into a model."""

    audio: ClassVar[None] = None
    vision: VisionConfig
    """The tower."""


class AudioTowerBlock(StrictConfig):
    """The block ``audio`` without a projector."""

    tower: WhisperConfig
    """The tower."""


class AudioTowerConfig(StrictConfig):
    """An audio tower without a decoder. Its weights can be counted, imported, exported, and loaded into a model."""

    vision: ClassVar[None] = None
    audio: AudioTowerBlock
    """The tower."""


class TokenizerConfig(StrictConfig):
    """An image tokenizer without a decoder of text. A run trains it with ``stages.*.reconstruction``."""

    vision: ClassVar[None] = None
    audio: ClassVar[None] = None
    connector: ClassVar[None] = None
    adapters: ClassVar[None] = None
    predicts_tokens: ClassVar[bool] = False
    image_tokenizer: ImageTokenizerConfig
    """The tokenizer."""
    image_size: Side = 256
    """Pixels of a side of the square images that a run trains on; a multiple of the pixels of a token. A trained
    tokenizer encodes images of any size."""
    discriminator: PatchDiscriminatorConfig | None = None
    """Discriminator of ``stages.*.reconstruction.discriminator``; null for training without one. Checkpoints contain
    it, exports do not."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that a stage can train or freeze."""
        return ("encoder", "codebook", "decoder", *(("discriminator",) if self.discriminator else ()))

    @model_validator(mode="after")
    def _check_size(self) -> TokenizerConfig:
        if self.image_size % self.image_tokenizer.stride:
            raise ValueError(
                f"image_size={self.image_size}: must be a multiple of the {self.image_tokenizer.stride} pixels of a "
                "token (2 ** (number of multipliers - 1))"
            )
        if self.discriminator is not None and self.image_size < self.discriminator.least_side:
            raise ValueError(
                f"discriminator.halvings={self.discriminator.halvings}: needs images of at least "
                f"{self.discriminator.least_side} pixels a side, not image_size={self.image_size}"
            )
        return self

    def media_needs(self) -> dict[str, Any]:
        """Return the fields of ``MediaSpec`` of a run that trains the tokenizer: one image for each document."""
        side = self.image_size // self.image_tokenizer.stride
        return {
            "placement": Placement.PAIR,
            "patch_size": self.image_tokenizer.stride,
            "channels": self.image_tokenizer.channels,
            "fixed_grid": (side, side),
        }


class ModelConfig(StrictConfig):
    """A multimodal model, or a text model if ``vision`` and ``connector`` are null."""

    decoder: DecoderConfig
    """The text decoder."""
    vision: AnyVisionConfig | None = None
    """The image tower: ``kind: transformer`` (the default), or ``kind: patches`` to pass the normalised pixels of each
    patch to the connector. Null for a text model."""
    connector: ConnectorConfig | None = None
    """How image features reach the decoder. Null for a text model: set ``vision`` and ``connector`` together."""
    audio: AudioModalityConfig | None = None
    """How the model hears: an audio tower and a projector. Null for a model that takes no sound."""
    image_tokenizer: ImageTokenizerConfig | None = None
    """The image tokenizer whose codes are ``decoder.image_tokens``. Checkpoints and exports contain its weights, and no
    stage trains them. Null if it has a checkpoint of its own."""
    adapters: AdaptersConfig | None = None
    """Low-rank adapters on linear layers (LoRA, DoRA); null for none."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that a stage can train or freeze: the keys of the model's ``components()``."""
        tower = ("vision",) if self.vision is not None and self.vision.learns else ()
        towers = (*tower, *self.connector.components) if self.vision is not None and self.connector is not None else ()
        for name, modality in self.modalities.items():
            towers = (*towers, *((name,) if modality.tower.learns else ()), f"{name}_connector")
        extra_tokens = ("extra_tokens",) if self.decoder.extra_tokens else ()
        image_tokens = (IMAGE_TOKENS,) if self.decoder.separate_image_tokens else ()
        tokenizer = (TOKENIZER,) if self.image_tokenizer else ()
        return (*towers, "decoder", *extra_tokens, *image_tokens, *tokenizer, *((COMPONENT,) if self.adapters else ()))

    @property
    def modalities(self) -> dict[str, ModalityBase]:
        """The modalities besides images, by name."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, ModalityBase)}

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
        if self.modalities and not self.predicts_tokens:
            raise ValueError(
                f"{next(iter(self.modalities))}: a contrastive model compares images with texts; leave it out"
            )
        codes, tokenizer = len(self.decoder.image_ids), self.image_tokenizer
        if tokenizer is not None and tokenizer.codebook_size != codes:
            raise ValueError(
                f"image_tokenizer.codebook_size={tokenizer.codebook_size}: must be the number of codes of "
                f"decoder.image_tokens, which is {codes}"
            )
        if self.adapters is not None and self.adapters.dropout and not self.predicts_tokens:
            raise ValueError(
                f"adapters.dropout={self.adapters.dropout:g}: a contrastive step may compute its vectors twice, and "
                "they must be equal; set it to 0"
            )
        return self


class ModelFile(ModelConfig):
    """The keys of the files of models, towers and image tokenizers together, for the JSON schema."""

    image_tokenizer: ImageTokenizerConfig | None = None
    """The image tokenizer, in a file without ``decoder`` and ``vision``."""
    image_size: Side = 256
    """Pixels of a side of the square images that a run trains an image tokenizer on."""
    discriminator: PatchDiscriminatorConfig | None = None
    """Discriminator of an image tokenizer's adversarial loss; null for training without one."""


AnyModelConfig = ModelConfig | TowerConfig | AudioTowerConfig | TokenizerConfig


def _trained_kind(value: Any) -> str:
    """Return the tag of a ``model`` block: that of an image tokenizer if it has no decoder."""
    if isinstance(value, Mapping):
        return "tokenizer" if "image_tokenizer" in value and "decoder" not in value else "model"
    return "tokenizer" if isinstance(value, TokenizerConfig) else "model"


TrainedModelConfig = Annotated[
    Annotated[ModelConfig, Tag("model")] | Annotated[TokenizerConfig, Tag("tokenizer")], Discriminator(_trained_kind)
]
"""The ``model`` block of a run."""


def read_model_config(values: Mapping[str, Any]) -> AnyModelConfig:
    """Return the model that JSON values describe, or the tower or image tokenizer if they have no ``decoder``.

    Raises:
        ValidationError: the values are not a valid model, tower or image tokenizer.
    """
    config: AnyModelConfig = kind_of_model(values).model_validate(values)
    return config


def kind_of_model(keys: Container[str]) -> type[AnyModelConfig]:
    """Return the class of a model's configuration that has these keys."""
    if "decoder" in keys:
        return ModelConfig
    if "image_tokenizer" in keys:
        return TokenizerConfig
    return AudioTowerConfig if "audio" in keys else TowerConfig
