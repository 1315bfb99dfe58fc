"""Janus: a SigLIP tower and an MLP to read images, an image tokenizer, an embedding and a head to draw them, Llama.

The tower's norms and layers are those of SigLIP; the output projection of its attention has another name. Its pooling
head is not part of the class.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import image_blocks, janus_vqgan, pixels, text_config, vit
from mmscale.hf.layouts.image_blocks import tokenizer_of
from mmscale.models.config import ModelConfig, TokenizerConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, MlpProjectorConfig
from mmscale.models.vision_config import VisionConfig

_TEXT, _TOWER, _TOKENIZER = "llama", "janus_vision_model", "janus_vqgan"
_LAYERS = 2
"""Layers of both projections."""


def _rules(config: ModelConfig) -> NameRules:
    assert isinstance(config.vision, VisionConfig)
    return (
        *with_prefix(janus_vqgan.LAYOUT.rules(tokenizer_of(config)), theirs=("", "model.vqmodel.")),
        *renames(
            ("vision.layers.{n}.self_attn.o_proj.", "model.vision_model.encoder.layers.{n}.self_attn.projection_layer.")
        ),
        *with_prefix(vit.clip_rules(config.vision), theirs=("", "model.")),
        *renames(
            ("connector.projector.fc1.", "model.aligner.fc1."),
            ("connector.projector.fc2.", "model.aligner.hidden_layers.0."),
            ("decoder.embed_tokens.image.codes.", "model.generation_embeddings."),
            ("decoder.embed_tokens.image.fc1.", "model.generation_aligner.fc1."),
            ("decoder.embed_tokens.image.fc2.", "model.generation_aligner.hidden_layers.0."),
            ("head.image.fc1.", "model.generation_head.proj_out."),
            ("head.image.", "model.generation_head.vision_head."),
            ("decoder.embed_tokens.extra_weight", "model.language_model.embed_tokens.weight"),
            ("head.extra_weight", "lm_head.weight"),
            ("decoder.", "model.language_model."),
            ("head.", "lm_head."),
        ),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text = keys.required_object("text_config")
    tower = keys.required_object("vision_config", _TOWER)
    drawing = keys.required_object("vq_config", _TOKENIZER)
    model = text_config.to_model(text, _TEXT, tied=bool(keys.read("tie_word_embeddings", bool)))
    width = model.decoder.hidden_dim
    tokens = _image_tokens(drawing, width)
    tokenizer = janus_vqgan.LAYOUT.to_model(drawing)
    assert isinstance(tokenizer, TokenizerConfig)
    drawing.must_be("model_type", _TOKENIZER)
    drawing.raise_on_unread()
    vision, activation = _vision(tower, width)
    return ModelConfig.model_validate(
        {
            "decoder": {**model.decoder.model_dump(), "image_tokens": tokens},
            "vision": {**vision, **pixels.to_model(keys, pixels.HALF)},
            "connector": {"kind": "embedding", "projector": {"kind": "mlp", "activation": activation}},
            "image_tokenizer": tokenizer.image_tokenizer,
        }
    )


def _vision(keys: Keys, width: int) -> tuple[dict[str, Any], str]:
    """Return ``vision`` without ``mean`` and ``std``, and the activation of the projection to ``width``."""
    keys.must_be("model_type", _TOWER)
    for rate in ("hidden_dropout_rate", "projection_dropout"):
        keys.must_be(rate, 0.0)
    keys.must_be("use_qk_norm", False)
    keys.must_be("attention_bias", True)
    keys.must_be("depth", _LAYERS)
    keys.must_be("projection_dim", width)
    hidden, ratio = keys.positive_int("hidden_size"), keys.read("mlp_ratio", float)
    values = {**keys.values, "intermediate_size": int(hidden * ratio)}
    filled = Keys(values, keys.where, unread=keys.unread)
    vision = vit.to_vision(filled, attention=vit.ATTENTION_BIASES, patch_bias=True)
    keys.read_keys |= filled.read_keys
    side = vision["positions"]["grid"][0]
    keys.must_be("num_image_tokens", side**2)
    keys.raise_on_unread()
    return vision, vision["mlp"]["activation"]


def _image_tokens(keys: Keys, width: int) -> dict[str, Any]:
    """Return ``decoder.image_tokens`` from the keys of the tokenizer."""
    keys.must_be("num_hidden_layers", _LAYERS)
    for key in ("projection_dim", "image_token_embed_dim"):
        keys.must_be(key, width)
    return {
        "kind": "separate",
        "codes": keys.read("num_embeddings", int),
        "code_dim": keys.read("embed_dim", int),
        "activation": vit.activation(keys, "hidden_act"),
    }


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector, tokens = config.vision, config.connector, config.decoder.separate_image_tokens
    if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
        raise CheckpointError("janus holds models with a vision tower and connector.kind=embedding")
    if not isinstance(connector.projector, MlpProjectorConfig) or tokens is None:
        raise CheckpointError(
            "janus holds models with connector.projector.kind=mlp and decoder.image_tokens.kind=separate"
        )
    width = config.decoder.hidden_dim
    tower = vit.to_keys(vision)
    ratio = tower.pop("intermediate_size") / vision.hidden_dim
    text = ModelConfig(decoder=config.decoder.model_copy(update={"image_tokens": None}))
    return {
        "text_config": text_config.to_keys(text, _TEXT),
        "vision_config": {
            "model_type": _TOWER,
            **tower,
            "mlp_ratio": ratio,
            "attention_bias": True,
            "depth": _LAYERS,
            "projection_dim": width,
            "num_image_tokens": (vit.image_size(vision) // vision.patch_size) ** 2,
        },
        "vq_config": {
            "model_type": _TOKENIZER,
            **janus_vqgan.LAYOUT.to_keys(tokenizer_of(config)),
            "hidden_act": vit.activation_key(tokens.activation),
            "num_hidden_layers": _LAYERS,
            "projection_dim": width,
            "image_token_embed_dim": width,
            "num_patches": vit.image_size(vision) // vision.patch_size,
        },
        "tie_word_embeddings": config.decoder.tie_embeddings,
        **pixels.to_keys(
            vision,
            image_processor_type="JanusImageProcessor",
            size={"height": vit.image_size(vision), "width": vit.image_size(vision)},
            resample=3,
        ),
    }


LAYOUT = FamilyLayout(
    "janus",
    "JanusForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    (r"model\.language_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    auto_class="AutoModelForImageTextToText",
    training_only=image_blocks.TRAINING_ONLY,
)
