"""Whisper's encoder, alone or in a folder of the whole model, and the same encoder in Qwen2-Audio.

An import of a whole folder drops the decoder's tensors. An export holds the encoder alone, by the names of
``WhisperEncoder``.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.audio_tower import WhisperConfig
from mmscale.models.config import AudioTowerConfig
from mmscale.nn.audio_embed import KERNEL, STRIDE

_DECODER_KEYS = (
    *("vocab_size", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop"),
    *("max_target_positions", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "tie_word_embeddings"),
    *("use_weighted_layer_sum", "classifier_proj_size", "median_filter_width"),
    *(f"mask_{axis}_{key}" for axis in ("time", "feature") for key in ("prob", "length", "min_masks")),
)
"""Keys of the decoder, of a classifier, or of augmentation, which ``apply_spec_augment`` switches on."""
FRAME_RATE = 100
"""Mel frames of a second."""
_EXTRACTOR = {"sampling_rate": 16_000, "hop_length": 160, "n_fft": 400, "padding_value": 0.0, "dither": 0.0}
"""Values of a feature extractor that the data pipeline fixes."""
_ZERO = ("dropout", "attention_dropout", "activation_dropout")


def encoder_rules(config: WhisperConfig) -> NameRules:
    """Return the rules of an encoder whose names have no prefix."""
    convolutions = (("conv1", config.num_bins), ("conv2", config.hidden_dim))
    block, theirs = "audio.layers.{n}.", "layers.{n}."
    return (
        *(
            NameRule(f"audio.embed.{name}.weight", f"{name}.weight", shape=(-1, channels, KERNEL))
            for name, channels in convolutions
        ),
        *renames(
            ("audio.embed.", ""),
            ("audio.positions.", "embed_positions."),
            ("audio.post_norm.", "layer_norm."),
            (f"{block}input_layernorm.", f"{theirs}self_attn_layer_norm."),
            (f"{block}post_attention_layernorm.", f"{theirs}final_layer_norm."),
            (f"{block}self_attn.o_proj.", f"{theirs}self_attn.out_proj."),
            (f"{block}self_attn.", f"{theirs}self_attn."),
            (f"{block}mlp.up_proj.", f"{theirs}fc1."),
            (f"{block}mlp.down_proj.", f"{theirs}fc2."),
        ),
    )


def to_tower(keys: Keys, **more: Any) -> dict[str, Any]:
    """Return the configuration of a tower of kind ``whisper``.

    Args:
        keys: Keys of the encoder.
        **more: Fields that the family fixes.

    Raises:
        CheckpointError: a key is missing or needs a computation that our models lack.
    """
    for name in (*_ZERO, "encoder_layerdrop"):
        keys.must_be(name, 0.0)
    keys.must_be("scale_embedding", False)
    layers = keys.read("encoder_layers", int)
    keys.must_be("num_hidden_layers", layers)  # Published files repeat the value.
    return {
        "kind": "whisper",
        "num_bins": keys.read("num_mel_bins", int),
        "max_frames": STRIDE * keys.read("max_source_positions", int),
        "hidden_dim": keys.read("d_model", int),
        "num_layers": layers,
        "attention": {
            "num_heads": keys.read("encoder_attention_heads", int),
            "qkv_bias": True,
            "key_bias": False,
            "out_bias": True,
        },
        "mlp": {
            "hidden_dim": keys.read("encoder_ffn_dim", int),
            "gated": False,
            "activation": vit.activation(keys, "activation_function"),
            "bias": True,
        },
        **more,
    }


def check_extractor(keys: Keys, tower: dict[str, Any]) -> None:
    """Require that the folder's feature extractor makes the log-mel frames that the data pipeline makes.

    Args:
        keys: Keys of the folder, with the feature extractor under ``preprocessor_config``.
        tower: As ``to_tower`` returns it.

    Raises:
        CheckpointError: a value differs.
    """
    block = keys.optional_object(PREPROCESSOR)
    if block is not None:
        block.must_be("feature_size", tower["num_bins"])
        block.must_be("chunk_length", tower["max_frames"] / FRAME_RATE)
        for name, value in _EXTRACTOR.items():
            block.must_be(name, value)


def extractor_keys(tower: WhisperConfig) -> dict[str, Any]:
    """Return ``preprocessor_config`` of a feature extractor.

    Raises:
        CheckpointError: chunks are not of whole seconds, as those of transformers are.
    """
    seconds, rest = divmod(tower.max_frames, FRAME_RATE)
    if rest:
        raise CheckpointError(
            f"audio.tower.max_frames={tower.max_frames}: processors of transformers have chunks of whole seconds, "
            f"which are {FRAME_RATE} frames each"
        )
    return {
        PREPROCESSOR: {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": tower.num_bins,
            "chunk_length": seconds,
            **_EXTRACTOR,
            "padding_side": "right",
            "return_attention_mask": True,
        }
    }


def encoder_keys(tower: WhisperConfig) -> dict[str, Any]:
    """Return the keys of an encoder."""
    return {
        "num_mel_bins": tower.num_bins,
        "max_source_positions": tower.max_frames // STRIDE,
        "d_model": tower.hidden_dim,
        "encoder_layers": tower.num_layers,
        "encoder_attention_heads": tower.attention.num_heads,
        "encoder_ffn_dim": tower.mlp.hidden_dim,
        "activation_function": vit.activation_key(tower.mlp.activation),
        "scale_embedding": False,
        **dict.fromkeys(_ZERO, 0.0),
    }


def _to_model(keys: Keys) -> AudioTowerConfig:
    keys.must_be("apply_spec_augment", False)
    keys.read_keys.update(_DECODER_KEYS)
    tower = to_tower(keys)
    check_extractor(keys, tower)
    return AudioTowerConfig.model_validate({"audio": {"tower": tower}})


LAYOUT = FamilyLayout(
    "whisper",
    "WhisperEncoder",
    lambda config: encoder_rules(config.audio.tower),
    _to_model,
    lambda config: encoder_keys(config.audio.tower),
    unused=(r"(model\.)?decoder\..*", r"proj_out\.weight", r"(projector|classifier)\..*", r"layer_weights"),
    aliases=((r"^(model\.)?encoder\.", ""),),
    kind=AudioTowerConfig,
    auto_class=None,
)
