"""Llama 1 to 3.3, and models that share its code."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig
from mmscale.nn.block import DenseMlpConfig


def _to_model(keys: Keys) -> ModelConfig:
    bias = keys.read("attention_bias", bool)
    mlp_bias = keys.read("mlp_bias", bool)
    return decoder.to_model(keys, attention={"qkv_bias": bias, "out_bias": bias}, mlp_bias=mlp_bias)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    block = config.decoder
    if block.hidden_dim % block.attention.num_heads:
        raise CheckpointError(f"llama's num_attention_heads={block.attention.num_heads} must divide {block.hidden_dim}")
    mlp_bias = isinstance(block.mlp, DenseMlpConfig) and block.mlp.bias
    return {**decoder.to_keys(config), "attention_bias": block.attention.qkv_bias, "mlp_bias": mlp_bias}


LAYOUT = FamilyLayout("llama", "LlamaForCausalLM", lambda _: decoder.RULES, _to_model, _to_keys, decoder.UNUSED)
