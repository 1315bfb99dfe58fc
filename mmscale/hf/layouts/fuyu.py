"""Fuyu 8B: Persimmon, whose token slots take pixels through one linear layer."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Axes, Layout, Row, Rows, under
from mmscale.hf.layouts import decoder, persimmon, pixels
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig
from mmscale.models.vision_config import PatchesConfig

_THETA = 25_000.0
"""Base that the published weights were trained with; Persimmon's class default in version 4."""


def _rows(config: ModelConfig) -> Rows:
    side, channels = config.vision.patch_size, config.vision.channels  # type: ignore[union-attr]
    # Theirs are pixels row by row with the channels innermost; ours are planes.
    planes = Axes((-1, side, side, channels), (0, 3, 1, 2))
    return (
        Row("connector.projector.linear.weight", "vision_embed_tokens.weight", axes=planes),
        Row("connector.projector.linear.bias", "vision_embed_tokens.bias"),
        *under(persimmon.table(config), theirs=("", "language_model.")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    keys.take("image_size", int, None)  # Of no effect: images have any size.
    tied = keys.take("tie_word_embeddings", bool)  # The head is the model's, so the model says whether it is tied.
    text = keys.block("text_config", "persimmon")
    if text is None:  # The first files of version 4 have the decoder's keys beside those of the model.
        text_values = persimmon.to_decoder(keys.filled("persimmon"))
    else:
        if keys.given.get("rope_theta") == _THETA:  # Version 4 leaves it out of the block, as its class default.
            text.values.setdefault("rope_theta", _THETA)
        text_values = persimmon.to_decoder(text)
        text.must_be("model_type", "persimmon")
        text.finish()
        decoder.check_repeats(keys, text, persimmon.to_decoder)
    vision = {
        "kind": "patches",
        "patch_size": keys.take("patch_size", int),
        "channels": keys.take("num_channels", int),
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
        raise CheckpointError("fuyu has words for patches in token slots alone (vision.kind: patches)")
    text, side = persimmon.to_keys(config), vision.patch_size
    return {
        "text_config": {"model_type": "persimmon", **text},
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "patch_size": side,
        "num_channels": vision.channels,
        **{key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **pixels.to_keys(vision, image_processor_type="FuyuImageProcessor", patch_size={"height": side, "width": side}),
    }


LAYOUT = Layout(
    "fuyu",
    "FuyuForCausalLM",
    _rows,
    _to_model,
    _to_keys,
    spellings=(  # Of version 5 of transformers, in memory; its files have those of version 4.
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_embed_tokens\.", "vision_embed_tokens."),
    ),
    auto_class="AutoModelForImageTextToText",
)
