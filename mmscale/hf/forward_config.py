"""The values of a model's configuration that change its forward computation, and how two of them differ.

An export may write any configuration with the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.config import AnyModelConfig, ModelConfig, TokenizerConfig
from mmscale.models.connector_config import MlpProjectorConfig
from mmscale.models.connectors.connector import FeatureConnectorBase
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig


def forward_config(config: AnyModelConfig) -> dict[str, Any]:
    """Return the config values that change the forward computation.

    Defaults are filled in, and the tokens of all tables are counted in ``decoder.vocab_size``.
    """
    values = config.model_dump(mode="json")
    if isinstance(config.vision, VisionConfig):
        _fill_attention(values["vision"], config.vision)
        values["vision"]["layer_scale"] = config.vision.layer_scale is not None
        del values["vision"]["init_std"]
        for gate in ("gate_init", "global_gate_init"):
            (values["vision"]["tiles"] or {}).pop(gate, None)
    if config.audio is not None and isinstance(config.audio.tower, WhisperConfig):
        _fill_attention(values["audio"]["tower"], config.audio.tower)
        del values["audio"]["tower"]["init_std"]
    if isinstance(config, ModelConfig | TokenizerConfig) and config.image_tokenizer is not None:
        for name in ("codebook_update", "idle_counts"):  # Used in training only.
            del values["image_tokenizer"][name]
        if values["image_tokenizer"].get("normalized_codes") == "always":
            # An export scales these codes to length 1. The search then finds the same ones with latents of any length.
            values["image_tokenizer"]["normalized_codes"] = "decoding"
    for name in ("image_size", "discriminator"):  # Of the run that trains an image tokenizer.
        values.pop(name, None)
    if not isinstance(config, ModelConfig):
        return values
    decoder, block = config.decoder, values["decoder"]
    block["vocab_size"] = decoder.num_ids
    _fill_attention(block, decoder)
    # ``extra_tokens`` matters only if the model predicts tokens and cannot predict some of the extra ids.
    if not config.predicts_tokens or decoder.predicted_rows == decoder.num_ids - decoder.vocab_size:
        del block["extra_tokens"]
    for name in ("dropout", "attention_dropout", "dropout_rows", "init_std"):  # Of training or initial values only.
        del block[name]
    if decoder.rope is not None:
        # Positions of text after a video, which the data pipeline makes. The weights fit both values.
        del block["rope"]["text_after_video"]
    if decoder.separate_image_tokens is None:
        del block["image_tokens"]  # Names rows of the vocabulary, which the computation does not need.
    for name in decoder.mlp.training_fields:
        del block["mlp"][name]
    if config.connector is not None:
        # The weights fit both values of ``unseen_text``, and transformers implements one of them.
        for name in (*config.connector.training_fields, "unseen_text"):
            values["connector"].pop(name, None)
    projector = config.connector.projector if isinstance(config.connector, FeatureConnectorBase) else None
    if isinstance(projector, MlpProjectorConfig):
        values["connector"]["projector"]["hidden_dim"] = projector.hidden_dim or decoder.hidden_dim
    return values


def _fill_attention(block: dict[str, Any], config: DecoderConfig | VisionConfig | WhisperConfig) -> None:
    attention = config.attention
    block["attention"]["num_kv_heads"] = attention.kv_heads
    block["attention"]["head_dim"] = attention.resolved_head_dim(config.hidden_dim)
    block["attention"]["qk_norm_config"] = (attention.qk_norm_config or config.norm).model_dump(mode="json")
    if block["attention"]["qk_norm"] == "none":
        del block["attention"]["qk_norm_config"]


def differences(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Yield a text for each value that differs, such as ``model.decoder.vocab_size=8 (only 9)``.

    Args:
        path: Name of the values.
        ours: Values of one configuration, nested mappings.
        theirs: Values of the other one.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from differences(f"{path}.{key}", ours.get(key), theirs.get(key))
    elif ours != theirs:
        yield f"{path}={ours!r} (only {theirs!r})"
