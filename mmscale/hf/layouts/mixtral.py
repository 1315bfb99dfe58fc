"""Mixtral: Mistral with experts in every block. A sliding window shorter than the context is rejected."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, renames
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig

_EXPERTS = decoder.ExpertKeys(
    "num_local_experts", "intermediate_size", {"router": "topk_then_softmax", "z_coefficient": 0.0}
)
_MOE = "model.layers.{n}.block_sparse_moe."
_RULES = (
    *decoder.expert_rules(f"{_MOE}experts.", "w1", "w3", "w2"),
    *renames(("decoder.layers.{n}.mlp.gate.", f"{_MOE}gate.")),
    *decoder.RULES,
)


def _to_model(keys: Keys) -> ModelConfig:
    decoder.check_window(keys)
    if keys.read("router_jitter_noise", float, 0.0):
        raise CheckpointError(
            f"{keys.describe('router_jitter_noise')} is not supported: in training it multiplies the input of the "
            "experts too, and mmscale's noise that of the router alone. Set it to 0.0 in config.json, which changes no "
            "answer; for noise in training, set model.decoder.mlp.jitter"
        )
    return decoder.to_model(keys, mlp=_EXPERTS.to_model(keys))


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    decoder.experts_of(config, "mixtral")
    return {**decoder.to_keys(config, _EXPERTS), "router_jitter_noise": 0.0, "sliding_window": None}


LAYOUT = FamilyLayout(
    "mixtral",
    "MixtralForCausalLM",
    lambda _: _RULES,
    _to_model,
    _to_keys,
    decoder.UNUSED,
    stacked=lambda _: decoder.RULES,
)
