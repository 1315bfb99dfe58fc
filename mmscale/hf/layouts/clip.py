"""CLIP, both towers: a contrastive model whose decoder is the text tower.

::

    vision_model.*        vision.*       features of the class row alone (``class_feature``)
    text_model.*          decoder.*      learned positions, no head
    visual_projection, text_projection, logit_scale      connector.*

The scale is learned as its logarithm on both sides. What stands for a text is its last row here, and documents end with
the end token; transformers takes the row of the first end token of a padded line, or that of the largest id where
``eos_token_id`` is 2, as in the files of 2022. So an end token with the id 2 cannot be told to it. Which id it has our
checkpoints do not know: without a folder like it an export says CLIP's where the vocabulary is as large as CLIP's, else
none. The vision tower by itself is ``clip_vision``.
"""

from __future__ import annotations

import math
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout, Row, Rows, rows
from mmscale.hf.layouts import clip_vision, pixels, vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import ContrastiveConnectorConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import DenseMlpConfig

_MAX_SCALE = 100.0
_IDS, _END = 49408, 49407


def _rows(config: ModelConfig) -> Rows:
    assert isinstance(config.vision, VisionConfig)
    tokens, places = "text_model.embeddings.token_embedding.", "text_model.embeddings.position_embedding."
    return (
        *vit.clip_rows(config.vision),
        *rows(
            ("decoder.embed_tokens.extra_weight", f"{tokens}weight"),
            ("decoder.embed_tokens.", tokens),
            ("decoder.embed_positions.", places),
            ("decoder.norm.", "text_model.final_layer_norm."),
        ),
        *vit.block_rows("decoder.", "text_model.encoder."),
        Row("connector.logit_scale", "logit_scale", shape=()),
        *rows(("connector.", "")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text, image = (vit.tower_block(keys, f"{name}_config", f"clip_{name}_model") for name in ("text", "vision"))
    keys.take("initializer_factor", float, None)
    decoder, vision = _to_decoder(text), clip_vision.to_vision(image)
    text.finish()
    image.finish()
    scale = math.exp(keys.take("logit_scale_init_value", float))
    return ModelConfig.model_validate(
        {
            "decoder": decoder,
            "vision": {**vision, "class_feature": True, **pixels.to_model(keys, pixels.CLIP)},
            "connector": {
                "kind": "contrastive",
                "dim": keys.take("projection_dim", int),
                "scale_init": min(scale, _MAX_SCALE),
                "max_scale": _MAX_SCALE,
            },
        }
    )


def _to_decoder(keys: Keys) -> dict[str, Any]:
    for name in ("dropout", "attention_dropout"):
        keys.must_be(name, 0.0)
    keys.take("projection_dim", int, None)  # The pair's counts.
    keys.take("initializer_factor", float, None)
    return {
        "vocab_size": keys.take("vocab_size", int),
        "rope": None,
        "learned_positions": keys.take("max_position_embeddings", int),
        **vit.to_stack(keys, attention=vit.BIASED),
    }


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or not isinstance(connector, ContrastiveConnectorConfig):
        raise CheckpointError("clip holds pairs of towers (connector.kind=contrastive)")
    processor = vit.cropped(vision)[PREPROCESSOR]
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
        "eos_token_id": _END if decoder.num_ids == _IDS else None,
    }


LAYOUT = Layout(
    "clip",
    "CLIPModel",
    _rows,
    _to_model,
    _to_keys,
    (vit.NUMBERS, r"text_model\.embeddings\.position_ids"),
    auto_class="AutoModel",
)
