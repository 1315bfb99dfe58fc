"""OLMoE: experts in every block, QK norms over the full width, and norms before the sub-layers."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig

_Z_COEFFICIENT = 0.001
"""Of OLMoE's own training (allenai/OLMoE, configs); transformers has no such loss and no key for it."""
_EXPERTS = decoder.ExpertKeys("num_experts", "intermediate_size", {"z_coefficient": _Z_COEFFICIENT})


def _to_model(keys: Keys) -> ModelConfig:
    keys.must_be("clip_qkv", None)
    heads = keys.positive_int("num_attention_heads")
    keys.must_be("head_dim", keys.read("hidden_size", int) // heads)  # Their QK norms have this width.
    bias = keys.read("attention_bias", bool)
    return decoder.to_model(
        keys,
        attention={"qkv_bias": bias, "out_bias": bias, "qk_norm": "full"},
        mlp=_EXPERTS.to_model(keys, renormalise=keys.read("norm_topk_prob", bool)),
    )


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    experts = decoder.experts_of(config, "olmoe")
    return {
        **decoder.to_keys(config, _EXPERTS),
        "norm_topk_prob": experts.renormalise,
        "attention_bias": config.decoder.attention.qkv_bias,
        "clip_qkv": None,
    }


LAYOUT = FamilyLayout(
    "olmoe",
    "OlmoeForCausalLM",
    lambda _: (*decoder.EXPERTS, *decoder.RULES),
    _to_model,
    _to_keys,
    decoder.UNUSED,
    stacked=lambda _: decoder.RULES,
)
