"""Fuyu 8B: Persimmon with image patches projected into token positions by one linear layer."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Axes, FamilyLayout, NameRule, NameRules, with_prefix
from mmscale.hf.layouts import decoder, persimmon, pixels
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig
from mmscale.models.vision_config import PatchesConfig

_THETA = 25_000.0
"""RoPE base of the published weights, and Persimmon's class default in version 4 of transformers."""

_ANSWER = "<0x04>"


def _rules(config: ModelConfig) -> NameRules:
    side, channels = config.vision.patch_size, config.vision.channels  # type: ignore[union-attr]
    # Their patches have channels innermost; ours have channels outermost.
    planes = Axes((-1, side, side, channels), (0, 3, 1, 2))
    return (
        NameRule("connector.projector.linear.weight", "vision_embed_tokens.weight", axes=planes),
        NameRule("connector.projector.linear.bias", "vision_embed_tokens.bias"),
        *with_prefix(persimmon.name_rules(config), theirs=("", "language_model.")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    keys.read("image_size", int, None)  # Has no effect: images may have any size.
    tied = keys.read("tie_word_embeddings", bool)  # The top-level value counts: the model class owns the head.
    text = keys.optional_object("text_config", "persimmon")
    if text is None:  # Early files of version 4 have the decoder's keys at the top level.
        text_values = persimmon.to_decoder(keys.with_defaults("persimmon"))
    else:
        if keys.given.get("rope_theta") == _THETA:  # Version 4 omits a class default in text_config.
            text.values.setdefault("rope_theta", _THETA)
        text_values = persimmon.to_decoder(text)
        text.must_be("model_type", "persimmon")
        text.raise_on_unread()
        decoder.check_repeats(keys, text, persimmon.to_decoder)
    vision = {
        "kind": "patches",
        "patch_size": keys.read("patch_size", int),
        "channels": keys.read("num_channels", int),
        **pixels.to_model(keys, pixels.HALF),
    }
    return ModelConfig.model_validate(
        {
            "decoder": {**text_values, "tie_embeddings": tied},
            "vision": vision,
            "connector": {"kind": "embedding", "projector": {"kind": "linear"}},
        }
    )


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    if not isinstance(vision, PatchesConfig) or not isinstance(config.connector, EmbeddingConnectorConfig):
        raise CheckpointError("fuyu holds models with vision.kind=patches and connector.kind=embedding")
    text, side = persimmon.to_keys(config), vision.patch_size
    return {
        "text_config": {"model_type": "persimmon", **text},
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "patch_size": side,
        "num_channels": vision.channels,
        **{key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **pixels.to_keys(vision, image_processor_type="FuyuImageProcessor", patch_size={"height": side, "width": side}),
    }


def _images(source: ImageSource) -> ImageInput:
    """Fuyu's processor writes the image, ``<s>``, the prompt and ``<0x04>``, after which the answer begins."""
    size = (source.values.get(PREPROCESSOR) or {}).get("size") or {}
    found = {"interpolation": "bilinear", **pixels.transforms(source.values, source.where)}
    return ImageInput(
        {
            "kind": "padded",
            "interpolation": found["interpolation"],
            "max_height": size.get("height", 1080),
            "max_width": size.get("width", 1920),
            "layout": {"row_end": "|NEWLINE|", "end": "<s>"},
        },
        tokens=("|SPEAKER|",),
        template={
            "kind": "dialogue",
            "roles": {"user": {"suffix": _ANSWER}, "assistant": {"weight": 1.0}},
            "special_tokens": [_ANSWER],
        },
        begin=False,
    )


LAYOUT = FamilyLayout(
    "fuyu",
    "FuyuForCausalLM",
    _rules,
    _to_model,
    _to_keys,
    aliases=(  # Version 5 of transformers uses these names in memory and writes those of version 4.
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_embed_tokens\.", "vision_embed_tokens."),
    ),
    modules=((r"^language_model\.model\.", "model.language_model."), (r"^(vision_embed_tokens)\.", r"model.\1.")),
    auto_class="AutoModelForImageTextToText",
    images=_images,
)
