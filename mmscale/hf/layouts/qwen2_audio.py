"""Qwen2-Audio: Whisper's encoder with the mean of pairs of rows, one linear layer, and Qwen 2.

The names are those of the published files; version 5 of transformers writes them too.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder, qwen2, qwen2_audio_encoder, whisper
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import LinearProjectorConfig

_TEXT, _TOWER = "qwen2", "qwen2_audio_encoder"


def _tower(config: ModelConfig) -> WhisperConfig:
    if config.audio is None or not isinstance(config.audio.tower, WhisperConfig) or config.vision is not None:
        raise CheckpointError("qwen2_audio holds models with audio.tower.kind=whisper and without vision")
    return config.audio.tower


def _rules(config: ModelConfig) -> NameRules:
    return (
        *with_prefix(whisper.encoder_rules(_tower(config)), theirs=("", "audio_tower.")),
        *renames(("audio_connector.", "multi_modal_projector.")),
        *with_prefix(decoder.RULES, theirs=("", "language_model.")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text = keys.required_object("text_config", _TEXT)
    text.must_be("model_type", _TEXT)
    text.must_be("use_mrope", False)
    model = qwen2.LAYOUT.to_model(text)
    assert isinstance(model, ModelConfig)
    text.raise_on_unread()
    encoder = keys.required_object("audio_config", _TOWER)
    encoder.must_be("model_type", _TOWER)
    tower = qwen2_audio_encoder.to_tower(encoder)
    encoder.raise_on_unread()
    whisper.check_extractor(keys, tower)
    keys.must_be("vocab_size", model.decoder.vocab_size)
    for name in ("audio_token_index", "audio_token_id", "ignore_index"):
        keys.read(name, int, None)
    audio = {"tower": tower, "projector": {"kind": "linear"}}
    return ModelConfig.model_validate({"decoder": model.decoder, "audio": audio})


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    tower = _tower(config)
    assert config.audio is not None
    if not isinstance(config.audio.projector, LinearProjectorConfig):
        raise CheckpointError("qwen2_audio holds projectors of one layer (audio.projector.kind=linear)")
    text = qwen2.LAYOUT.to_keys(ModelConfig(decoder=config.decoder))
    return {
        "text_config": {"model_type": _TEXT, **text},
        "audio_config": {"model_type": _TOWER, **whisper.encoder_keys(tower)},
        "vocab_size": text["vocab_size"],
        **whisper.extractor_keys(tower),
    }


def sounds(source: ImageSource) -> dict[str, Any]:
    """Return the tokens of a folder's sounds."""
    return {
        "start": source.name("audio_bos_token", "<|audio_bos|>"),
        "end": source.name("audio_eos_token", "<|audio_eos|>"),
        "placeholder": source.name("audio_token", "<|AUDIO|>"),
    }


LAYOUT = FamilyLayout(
    "qwen2_audio",
    "Qwen2AudioForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    tuple(rf"language_model\.{name}" for name in decoder.UNUSED),
    modules=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(audio_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    aliases=(
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(audio_tower|multi_modal_projector)\.", r"\1."),
    ),
    auto_class="AutoModelForMultimodalLM",
    sounds=sounds,
)
