"""The thinker of Qwen2.5-Omni: Qwen2.5-VL that also hears, through Whisper's encoder in blocks of two seconds.

The names are those of the published files without ``thinker.``; version 5 of transformers writes them too.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder, qwen2, qwen2_5_vl, qwen2_audio, qwen2_audio_encoder, qwen2_vl, whisper
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import LinearProjectorConfig

FAMILY = "qwen2_5_omni_thinker"
_TEXT, _VISION, _AUDIO = "qwen2_5_omni_text", "qwen2_5_omni_vision_encoder", "qwen2_5_omni_audio_encoder"
_BLOCK, _THEIRS = "vision.layers.{n}.self_attn.", "visual.blocks.{n}.attn."
_SECONDS, _MOST_SECONDS = 300, 655
"""Longest clip of the published feature extractor, and the longest one that our models can have."""
_TABLE_ROWS = 1500
"""Published rows of the table of sinusoids, of which their code reads those of one block."""
_IDLE_ROWS = 2
"""Rows of ``audio_bos_eos_token``, which no code reads."""
_NEUTRAL = (
    *("audio_token_index", "video_token_index", "audio_start_token_id", "audio_end_token_id", "user_token_id"),
    *("audio_token_id", "ignore_index"),
    "seconds_per_chunk",  # Of a video whose sound is interleaved with its frames.
)
"""Keys that do not change what the model computes."""


def _tower(config: ModelConfig) -> WhisperConfig:
    tower = None if config.audio is None else config.audio.tower
    if not isinstance(tower, WhisperConfig) or tower.block_frames is None:
        raise CheckpointError(
            f"{FAMILY} holds models with a vision tower and audio.tower.kind=whisper with block_frames"
        )
    return tower


def rules(config: ModelConfig) -> NameRules:
    """Return the name rules of the thinker."""
    qkv = ((f"{_BLOCK}{name}_proj.", f"{_THEIRS}{name}.") for name in ("q", "k", "v"))
    return (
        *renames(
            ("audio.post_norm.", "audio_tower.ln_post."),
            ("audio_connector.idle.", "audio_tower.audio_bos_eos_token."),
            ("audio_connector.linear.", "audio_tower.proj."),
            *qkv,  # Before the rules of Qwen2.5-VL, which stores them as one tensor.
        ),
        *with_prefix(whisper.encoder_rules(_tower(config)), theirs=("", "audio_tower.")),
        *qwen2_5_vl.LAYOUT.rules(config),
    )


def to_model(keys: Keys) -> ModelConfig:
    """Return the configuration of the thinker whose keys are at the top level of ``keys``."""
    keys.read_keys.update(_NEUTRAL)
    text = keys.required_object("text_config", _TEXT)
    text.must_be("model_type", _TEXT)
    qwen2.check_attention(text)
    text.read("tie_word_embeddings", bool, None)  # Only the key outside of this block is used.
    tied = keys.read("tie_word_embeddings", bool)
    model = decoder.to_model(text, attention={"qkv_bias": True}, sectioned=True, tie_embeddings=tied)
    text.raise_on_unread()
    per_second = keys.positive_int("position_id_per_seconds", 1000)
    tower = keys.required_object("vision_config", _VISION)
    tower.must_be("model_type", _VISION)
    tower.must_be("tokens_per_second", per_second)  # Published files repeat the value; no code reads it.
    tower.must_be("embed_dim", tower.read("hidden_size", int))
    values = qwen2_5_vl.to_values(keys, model, tower, per_second)
    values["audio"] = {
        "tower": _audio_tower(keys, model.decoder.hidden_dim),
        "projector": {"kind": "linear"},
        "idle_rows": _IDLE_ROWS,
    }
    return ModelConfig.model_validate(values)


def _audio_tower(keys: Keys, text_dim: int) -> dict[str, Any]:
    encoder = keys.required_object("audio_config", _AUDIO)
    encoder.must_be("model_type", _AUDIO)
    encoder.must_be("output_dim", text_dim)
    extractor = keys.optional_object(PREPROCESSOR)
    seconds = _SECONDS if extractor is None else extractor.positive_int("chunk_length", _MOST_SECONDS, _SECONDS)
    tower = whisper.to_tower(
        encoder,
        **qwen2_audio_encoder.NATIVE,
        block_frames=2 * encoder.positive_int("n_window", 1 << 15),
        max_frames=whisper.FRAME_RATE * seconds,
    )
    encoder.raise_on_unread()
    whisper.check_extractor(keys, tower)
    return tower


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of the thinker, with those of both processors under ``preprocessor_config``."""
    tower = _tower(config)
    assert config.audio is not None
    assert tower.block_frames is not None
    if not isinstance(config.audio.projector, LinearProjectorConfig):
        raise CheckpointError(f"{FAMILY} holds projectors of one layer for sound (audio.projector.kind=linear)")
    per_second = qwen2_5_vl.positions_per_second(config, FAMILY)
    values = qwen2_5_vl.keys_of(config, _TEXT, FAMILY)
    values["vision_config"]["model_type"] = _VISION
    values[PREPROCESSOR] |= {**whisper.extractor_keys(tower)[PREPROCESSOR], "processor_class": "Qwen2_5OmniProcessor"}
    window = tower.block_frames // 2
    return {
        **values,
        "audio_config": {
            "model_type": _AUDIO,
            **whisper.encoder_keys(tower),
            "max_source_positions": max(_TABLE_ROWS, window),
            "n_window": window,
            "output_dim": config.decoder.hidden_dim,
        },
        "position_id_per_seconds": per_second,
    }


def images(source: ImageSource) -> ImageInput:
    """Return the images and videos of a folder. Its processor ignores the limits of pixels of the video processor."""
    return qwen2_vl.native_images(source, "<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", {"placeholder": "<|VIDEO|>"})


LAYOUT = FamilyLayout(
    FAMILY,
    "Qwen2_5OmniThinkerForConditionalGeneration",
    rules,
    to_model,
    to_keys,
    decoder.UNUSED,
    modules=((r"^(visual|audio_tower)\.", r"model.\1."), (r"^model\.", "model.language_model.")),
    aliases=(
        (r"^(?:thinker\.)?model\.language_model\.", "model."),
        (r"^(?:thinker\.)?model\.(visual|audio_tower)\.", r"\1."),
        (r"^thinker\.", ""),
    ),
    auto_class="AutoModelForImageTextToText",
    images=images,
    sounds=qwen2_audio.sounds,
)
