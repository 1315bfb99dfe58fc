"""CLIP with both towers: a contrastive model whose decoder is the text tower.

::

    vision_model.*        vision.*       the class row is the only feature (``class_feature``)
    text_model.*          decoder.*      learned positions, no head
    visual_projection, text_projection, logit_scale      connector.*

Both implementations learn the logarithm of the scale. ``clip_vision`` is the vision tower alone.

mmscale represents a text by its last row, and documents end with the end token. transformers takes the row of the first
end token in a padded line. If ``eos_token_id`` is 2, as in files from 2022, it takes the row with the largest id
instead, so a real end token with id 2 cannot be expressed.

Our checkpoints do not store the end token's id. Without ``--like``, an export writes CLIP's id if the vocabulary has
CLIP's size, else null.
"""

from __future__ import annotations

import math
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import clip_vision, pixels, vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import DenseMlpConfig

_MAX_SCALE = 100.0
_CLIP_VOCAB_SIZE, _CLIP_END_ID = 49408, 49407


def _rules(config: ModelConfig) -> NameRules:
    assert isinstance(config.vision, VisionConfig)
    tokens, positions = "text_model.embeddings.token_embedding.", "text_model.embeddings.position_embedding."
    return (
        *vit.clip_rules(config.vision),
        *renames(
            ("decoder.embed_tokens.extra_weight", f"{tokens}weight"),
            ("decoder.embed_tokens.", tokens),
            ("decoder.embed_positions.", positions),
            ("decoder.norm.", "text_model.final_layer_norm."),
        ),
        *vit.block_rules("decoder.", "text_model.encoder."),
        NameRule("connector.logit_scale", "logit_scale", shape=()),
        *renames(("connector.", "")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text, image = (vit.tower_keys(keys, f"{name}_config", f"clip_{name}_model") for name in ("text", "vision"))
    keys.read("initializer_factor", float, None)
    decoder, vision = _to_decoder(text), clip_vision.to_vision(image)
    text.raise_on_unread()
    image.raise_on_unread()
    scale = math.exp(keys.read("logit_scale_init_value", float))
    return ModelConfig.model_validate(
        {
            "decoder": decoder,
            "vision": {**vision, "class_feature": True, **pixels.to_model(keys, pixels.CLIP)},
            "connector": {
                "kind": "contrastive",
                "dim": keys.read("projection_dim", int),
                "scale_init": min(scale, _MAX_SCALE),
                "max_scale": _MAX_SCALE,
            },
        }
    )


def _to_decoder(keys: Keys) -> dict[str, Any]:
    for name in ("dropout", "attention_dropout"):
        keys.must_be(name, 0.0)
    keys.read("projection_dim", int, None)  # transformers uses the top-level value.
    keys.read("initializer_factor", float, None)
    return {
        "vocab_size": keys.read("vocab_size", int),
        "rope": None,
        "learned_positions": keys.read("max_position_embeddings", int),
        **vit.to_stack(keys, attention=vit.ATTENTION_BIASES),
    }


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or not isinstance(connector, ContrastiveConnectorConfig):
        raise CheckpointError("clip holds models with two towers (connector.kind=contrastive)")
    processor = vit.crop_processor_keys(vision)[PREPROCESSOR]
    return {
        "text_config": {"model_type": "clip_text_model", **_text_keys(config.decoder), "projection_dim": connector.dim},
        "vision_config": {
            "model_type": "clip_vision_model",
            **vit.to_keys(vision),
            "projection_dim": connector.dim,
        },
        "projection_dim": connector.dim,
        "logit_scale_init_value": math.log(connector.first_scale),
        PREPROCESSOR: processor,
    }


def _text_keys(decoder: DecoderConfig) -> dict[str, Any]:
    if not isinstance(decoder.mlp, DenseMlpConfig) or decoder.learned_positions is None:
        raise CheckpointError("clip's text tower has a dense feed-forward and decoder.learned_positions")
    return {
        "vocab_size": decoder.num_ids,
        "max_position_embeddings": decoder.learned_positions,
        **vit.stack_keys(decoder, decoder.mlp),
        **dict.fromkeys(("bos_token_id", "pad_token_id")),
        "eos_token_id": _CLIP_END_ID if decoder.num_ids == _CLIP_VOCAB_SIZE else None,
    }


def _images(source: ImageSource) -> ImageInput:
    return pixels.fixed_images(source, {"kind": "caption"})


LAYOUT = FamilyLayout(
    "clip",
    "CLIPModel",
    _rules,
    _to_model,
    _to_keys,
    (vit.POSITION_IDS, r"text_model\.embeddings\.position_ids"),
    auto_class="AutoModel",
    images=_images,
)
