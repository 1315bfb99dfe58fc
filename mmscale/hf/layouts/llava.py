"""LLaVA's format with Pixtral's tower: images of any size, a two-layer MLP, and a supported text decoder.

Pixtral 12B is published in this format. Objects in its ``config.json`` may omit keys that have their class default.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import axial, decoder, pixels, text_config, vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, MlpProjectorConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.rope import FrequencyLayout

_LONGEST = 1024
"""Largest image side that Pixtral was trained on, pixels. Version 4 of transformers sizes a table of angles by it."""
_BLOCK, _THEIRS = "vision.layers.{n}.", "vision_tower.transformer.layers.{n}."


def _rules(config: ModelConfig) -> NameRules:
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    return (
        vit.convolution("vision_tower.patch_conv.weight", vision),
        *renames(
            ("vision.pre_norm.", "vision_tower.ln_pre."),
            (f"{_BLOCK}input_layernorm.", f"{_THEIRS}attention_norm."),
            (f"{_BLOCK}self_attn.", f"{_THEIRS}attention."),
            (f"{_BLOCK}post_attention_layernorm.", f"{_THEIRS}ffn_norm."),
            (f"{_BLOCK}mlp.", f"{_THEIRS}feed_forward."),
            ("connector.projector.fc1.", "multi_modal_projector.linear_1."),
            ("connector.projector.fc2.", "multi_modal_projector.linear_2."),
        ),
        *with_prefix(decoder.RULES, theirs=("", "language_model.")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text, tower = keys.required_object("text_config"), keys.required_object("vision_config")
    keys.read("ignore_index", int, None)  # Used by the loss before version 4.46.
    keys.must_be("vision_feature_select_strategy", "full")
    if "vision_feature_layer" not in keys.values or "vision_feature_select_strategy" not in keys.values:
        raise CheckpointError(
            f"{keys.where}: vision_feature_layer or vision_feature_select_strategy is missing; the default, the "
            "second to last block, is not supported"
        )
    keys.must_be("vision_feature_layer", -1, [-1])
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
            "vision": {**_vision(tower), **pixels.to_model(keys, pixels.CLIP)},
            "connector": {"kind": "embedding", "projector": projector},
        }
    )


def _vision(given: Keys) -> dict[str, Any]:
    kind = given.read("model_type", str, "clip_vision_model")
    if kind != "pixtral":
        raise CheckpointError(f"{given.where}: model_type={kind!r} is not supported, only 'pixtral'")
    keys = given.with_defaults(kind)
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
    return {
        "text_config": text_config.to_keys(config, "mistral"),
        "vision_config": _vision_keys(vision),
        "projector_hidden_act": vit.activation_key(connector.projector.activation),
        "multimodal_projector_bias": connector.projector.bias,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": config.decoder.tie_embeddings,
        **pixels.to_keys(
            vision,
            image_processor_type="PixtralImageProcessor",
            patch_size={"height": vision.patch_size, "width": vision.patch_size},
        ),
    }


def _vision_keys(vision: VisionConfig) -> dict[str, Any]:
    return {
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
    }


def _images(source: ImageSource) -> ImageInput:
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
    tuple(rf"language_model\.{name}" for name in decoder.UNUSED),
    aliases=(
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
