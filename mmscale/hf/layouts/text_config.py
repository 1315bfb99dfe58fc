"""The text decoder of an image model: a family of its own under ``text_config`` (LLaVA, InternVL, Idefics3)."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layouts import llama, mistral, qwen2, qwen3
from mmscale.models.config import ModelConfig

_TEXTS = {layout.model_type: layout for layout in (llama.LAYOUT, qwen2.LAYOUT, mistral.LAYOUT, qwen3.LAYOUT)}
"""Decoder families; an export tries them in this order, after the family's default."""


def to_model(keys: Keys, default: str, *, tied: bool) -> ModelConfig:
    """Return the text model of ``text_config``.

    Args:
        keys: Keys of the object.
        default: Family of an object without ``model_type``.
        tied: Whether the embedding is the output projection, which the whole model's file states.

    Raises:
        CheckpointError: the family is not known, or a key is missing, unknown or needs a computation that our models
            lack.
    """
    kind = keys.read("model_type", str, default)
    if kind not in _TEXTS:
        raise CheckpointError(f"{keys.where}: model_type={kind!r} is not supported, only {', '.join(_TEXTS)}")
    filled = Keys({**keys.given, "tie_word_embeddings": tied}, keys.where, kind, keys.unread)
    filled.read("is_composition", bool, None)
    model = _TEXTS[kind].to_model(filled)
    filled.raise_on_unread()
    assert isinstance(model, ModelConfig)
    return model


def to_keys(config: ModelConfig, default: str) -> dict[str, Any]:
    """Return ``text_config`` of a model, in the first family that can express its decoder.

    Args:
        config: The whole model.
        default: Family to try first.

    Raises:
        CheckpointError: no family can; the message has the reason of each.
    """
    reasons = []
    for layout in sorted(_TEXTS.values(), key=lambda layout: layout.model_type != default):
        try:
            values = layout.config_values(ModelConfig(decoder=config.decoder))
            return {key: value for key, value in values.items() if key != "architectures"}
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError("text_config: " + " | ".join(dict.fromkeys(reasons)))


def tied(keys: Keys, text: Keys) -> bool:
    """Return whether the embedding is the output projection.

    Version 5 of transformers writes the key at the top level. Version 4 writes it there only if it differs from the
    class default, and reads the one in ``text_config``.
    """
    if "tie_word_embeddings" not in keys.given and str(keys.given.get("transformers_version", "")).startswith("4."):
        return bool(text.read("tie_word_embeddings", bool, False))
    return bool(keys.read("tie_word_embeddings", bool))
