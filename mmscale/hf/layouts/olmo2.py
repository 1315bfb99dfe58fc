"""OLMo 2, and OLMo-7B-1024 before it: norms behind the sub-layers, and over all queries and all keys."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout, rows
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig

ROWS = (
    *rows(
        ("decoder.layers.{n}.input_layernorm.", "model.layers.{n}.post_attention_layernorm."),
        ("decoder.layers.{n}.post_attention_layernorm.", "model.layers.{n}.post_feedforward_layernorm."),
    ),
    *decoder.ROWS,
)


def _to_model(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", bool)
    attention = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "full"}
    return decoder.to_model(keys, attention=attention, norm_placement="post")


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "attention_bias": config.decoder.attention.qkv_bias}


LAYOUT = Layout("olmo2", "Olmo2ForCausalLM", lambda _: ROWS, _to_model, _to_keys, decoder.UNUSED)
