"""Qwen 3, dense: a norm of the queries and keys of each head, and no biases."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import decoder
from mmscale.hf.layouts.qwen2 import check_attention
from mmscale.models.config import ModelConfig


def to_attention(keys: Keys) -> dict[str, Any]:
    """Return the fields of ``decoder.attention`` that dense Qwen 3 and Qwen 3 with experts share."""
    bias = keys.read("attention_bias", bool)
    return {"qkv_bias": bias, "out_bias": bias, "qk_norm": "head"}


def attention_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the inverse of ``to_attention``."""
    return {"attention_bias": config.decoder.attention.qkv_bias, "use_sliding_window": False}


def _to_model(keys: Keys) -> ModelConfig:
    check_attention(keys)
    return decoder.to_model(keys, attention=to_attention(keys))


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    head_dim = config.decoder.attention.resolved_head_dim(config.decoder.hidden_dim)  # It has a class default.
    return {**decoder.to_keys(config), "head_dim": head_dim, **attention_keys(config)}


LAYOUT = FamilyLayout("qwen3", "Qwen3ForCausalLM", lambda _: decoder.RULES, _to_model, _to_keys, decoder.UNUSED)
