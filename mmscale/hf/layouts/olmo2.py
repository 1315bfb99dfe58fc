"""OLMo 2 and its predecessor OLMo-7B-1024: norms after the sub-layers, QK norms over the full width."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, renames
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig

RULES = (
    *renames(
        ("decoder.layers.{n}.input_layernorm.", "model.layers.{n}.post_attention_layernorm."),
        ("decoder.layers.{n}.post_attention_layernorm.", "model.layers.{n}.post_feedforward_layernorm."),
    ),
    *decoder.RULES,
)


def _to_model(keys: Keys) -> ModelConfig:
    bias = keys.read("attention_bias", bool)
    attention = {"qkv_bias": bias, "out_bias": bias, "qk_norm": "full"}
    return decoder.to_model(keys, attention=attention, norm_placement="post")


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "attention_bias": config.decoder.attention.qkv_bias}


LAYOUT = FamilyLayout("olmo2", "Olmo2ForCausalLM", lambda _: RULES, _to_model, _to_keys, decoder.UNUSED)
