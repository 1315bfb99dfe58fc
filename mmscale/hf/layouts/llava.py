"""LLaVA's format: a tower of CLIP or Pixtral, a two-layer MLP, and a text decoder.

LLaVA-1.5 reads the output of a block of CLIP before the last one, without the class row. Its folder contains the idle
last blocks and the norm after them. Pixtral 12B is published in this format, too. Objects in ``config.json`` may omit
keys that have their class default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import axial, clip_vision, decoder, pixels, text_config, vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, MlpProjectorConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.rope import FrequencyLayout, Rotary2dConfig

_CLIP = "clip_vision_model"
_LONGEST = 1024
"""Largest image side that Pixtral was trained on, pixels. Version 4 of transformers sizes a table of angles by it."""
_BLOCK, _THEIRS = "vision.layers.{n}.", "vision_tower.transformer.layers.{n}."


def _rules(config: ModelConfig) -> NameRules:
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    return (
        *(_pixtral_rules(vision) if _is_pixtral(vision) else _clip_rules(vision)),
        *renames(
            ("connector.projector.fc1.", "multi_modal_projector.linear_1."),
            ("connector.projector.fc2.", "multi_modal_projector.linear_2."),
        ),
        *with_prefix(decoder.RULES, theirs=("", "language_model.")),
    )


def _is_pixtral(vision: VisionConfig) -> bool:
    return isinstance(vision.positions, Rotary2dConfig)


def _clip_rules(vision: VisionConfig) -> NameRules:
    return (
        *with_prefix(vit.clip_rules(vision), theirs=("vision_model.", "vision_tower.")),
        *renames(("vision.idle_norm.", "vision_tower.post_layernorm.")),
    )


def _pixtral_rules(vision: VisionConfig) -> NameRules:
    return (
        vit.convolution("vision_tower.patch_conv.weight", vision),
        *renames(
            ("vision.pre_norm.", "vision_tower.ln_pre."),
            (f"{_BLOCK}input_layernorm.", f"{_THEIRS}attention_norm."),
            (f"{_BLOCK}self_attn.", f"{_THEIRS}attention."),
            (f"{_BLOCK}post_attention_layernorm.", f"{_THEIRS}ffn_norm."),
            (f"{_BLOCK}mlp.", f"{_THEIRS}feed_forward."),
        ),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text, tower = keys.required_object("text_config"), keys.required_object("vision_config")
    keys.read("ignore_index", int, None)  # Used by the loss before version 4.46.
    keys.read("vocab_size", int, None)  # A repetition in the first files.
    projector = {
        "kind": "mlp",
        "activation": vit.activation(keys, "projector_hidden_act"),
        "bias": keys.read("multimodal_projector_bias", bool),
    }
    tied = keys.read("tie_word_embeddings", bool) or text.read("tie_word_embeddings", bool, False)
    model = text_config.to_model(text, "llama", tied=tied)
    return ModelConfig.model_validate(
        {
            "decoder": model.decoder,
            "vision": {**_vision(keys, tower), **pixels.to_model(keys, pixels.CLIP)},
            "connector": {"kind": "embedding", "projector": projector},
        }
    )


def _vision(whole: Keys, given: Keys) -> dict[str, Any]:
    """Return ``vision`` without ``mean`` and ``std``.

    Args:
        whole: Keys of the whole model, which choose the features.
        given: Keys of the tower.
    """
    kind = given.read("model_type", str, _CLIP)
    if kind == _CLIP:
        return _clip(whole, given.with_defaults(kind))
    if kind != "pixtral":
        raise CheckpointError(f"{given.where}: model_type={kind!r} is not supported, only {_CLIP!r} and 'pixtral'")
    whole.must_be("vision_feature_layer", -1, [-1])
    whole.must_be("vision_feature_select_strategy", "full")
    return _pixtral(given.with_defaults(kind))


def _clip(whole: Keys, keys: Keys) -> dict[str, Any]:
    whole.must_be("vision_feature_select_strategy", "default")
    several = isinstance(whole.values["vision_feature_layer"], list)
    layers = whole.read("vision_feature_layer", list if several else int)
    count = keys.positive_int("num_hidden_layers")
    # Theirs counts the input of the first block as 0.
    features = [layer + count if layer < 0 else layer - 1 for layer in (layers if several else [layers])]
    if not all(0 <= layer < count - 1 for layer in features):
        raise CheckpointError(
            f"{whole.describe('vision_feature_layer')} is not supported, only blocks before the last, such as -2"
        )
    keys.read("vocab_size", int, None)  # The first files repeat that of the text here.
    vision = clip_vision.to_vision(keys)
    keys.raise_on_unread()
    return {
        **vision,
        "post_norm": False,
        "feature_layers": features,
        "last_output": False,
        "idle_layers": count - 1 - max(features),
        "idle_norm": True,
    }


def _pixtral(keys: Keys) -> dict[str, Any]:
    keys.read("is_composition", bool, None)
    keys.read("image_size", int, None)  # Only sizes a table of angles.
    keys.must_be("attention_dropout", 0.0)
    dim, heads = keys.read("hidden_size", int), keys.positive_int("num_attention_heads")
    keys.must_be("head_dim", dim // heads)
    vision = {
        "patch_size": keys.read("patch_size", int),
        "channels": keys.read("num_channels", int),
        "hidden_dim": dim,
        "num_layers": keys.read("num_hidden_layers", int),
        "attention": {"num_heads": heads},
        "mlp": {
            "hidden_dim": keys.read("intermediate_size", int),
            "activation": vit.activation(keys, "hidden_act"),
        },
        "norm": {"kind": "rmsnorm", "eps": 1e-5},
        "positions": axial.to_model(keys, FrequencyLayout.ALTERNATING),
        "pre_norm": True,
        "post_norm": False,
    }
    keys.raise_on_unread()
    return vision


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
        raise CheckpointError("llava holds models with a vision tower and connector.kind=embedding")
    if not isinstance(connector.projector, MlpProjectorConfig):
        raise CheckpointError("llava holds projectors of two layers (connector.projector.kind=mlp)")
    tower = _pixtral_keys(vision) if _is_pixtral(vision) else _clip_keys(vision)
    return {
        "text_config": text_config.to_keys(config, "mistral" if _is_pixtral(vision) else "llama"),
        "projector_hidden_act": vit.activation_key(connector.projector.activation),
        "multimodal_projector_bias": connector.projector.bias,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        **tower,
    }


def _clip_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of the tower, of its features and of the image processor."""
    if vision.last_output or not vision.feature_layers:
        raise CheckpointError(
            "llava reads a block of CLIP before the last one: vision.feature_layers, with last_output: false"
        )
    layers = [layer - vision.num_layers for layer in vision.feature_layers]
    return {
        "vision_config": {"model_type": _CLIP, **vit.to_keys(vision)},
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "default",
        "image_seq_length": (vit.image_size(vision) // vision.patch_size) ** 2,
        **vit.crop_processor_keys(vision),
    }


def _pixtral_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of the tower, of its features and of the image processor."""
    return {
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": vision.hidden_dim,
            "intermediate_size": vision.mlp.hidden_dim,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.attention.num_heads,
            "num_channels": vision.channels,
            "image_size": _LONGEST,
            "patch_size": vision.patch_size,
            "hidden_act": vit.activation_key(vision.mlp.activation),
            "attention_dropout": 0.0,
            **axial.to_keys(vision),
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **pixels.to_keys(
            vision,
            image_processor_type="PixtralImageProcessor",
            patch_size={"height": vision.patch_size, "width": vision.patch_size},
        ),
    }


def _images(source: ImageSource) -> ImageInput:
    vision = source.config.vision
    if not isinstance(vision, VisionConfig) or not _is_pixtral(vision):
        return replace(pixels.fixed_images(source), tokens=("<image>",))
    size = (source.values.get(PREPROCESSOR) or {}).get("size") or {}
    found = {"interpolation": "bicubic", **pixels.transforms(source.values, source.where)}
    layout = {
        "row_break": source.name("image_break_token", "[IMG_BREAK]"),
        "end": source.name("image_end_token", "[IMG_END]"),
    }
    return ImageInput(
        {
            "kind": "longest_side",
            "interpolation": found["interpolation"],
            "longest": size.get("longest_edge", _LONGEST),
            "layout": layout,
        },
        tokens=(source.name("image_token", "[IMG]"),),
    )


LAYOUT = FamilyLayout(
    "llava",
    "LlavaForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    (r"vision_tower\.embeddings\.position_ids", *(rf"language_model\.{name}" for name in decoder.UNUSED)),
    aliases=(
        (r"^(model\.)?vision_tower\.vision_model\.", "vision_tower."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ),
    modules=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    auto_class="AutoModelForImageTextToText",
    images=_images,
)
