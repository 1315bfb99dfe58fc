"""Qwen 3 with experts, such as Qwen3-30B-A3B: in every n-th block, except in the first dense ones."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import decoder
from mmscale.hf.layouts.qwen3 import attention_keys, to_attention
from mmscale.models.config import ModelConfig

_EXPERTS = decoder.ExpertKeys("num_experts", "moe_intermediate_size", {"z_coefficient": 0.0})


def _num_experts(keys: Keys) -> int:
    """Return the number of experts. Files that version 5 of transformers has written call it ``num_local_experts``."""
    names = [name for name in ("num_experts", "num_local_experts") if name in keys.given] or ["num_local_experts"]
    counts = {keys.read(name, int) for name in names}
    if len(counts) > 1:
        raise CheckpointError(f"{keys.describe('num_experts')} contradicts {keys.describe('num_local_experts')}")
    return counts.pop()


def _to_model(keys: Keys) -> ModelConfig:
    decoder.check_window(keys, keys.read("use_sliding_window", bool))
    keys.read("max_window_layers", int, None)  # The class applies a window to all blocks.
    every, dense_layers = keys.positive_int("decoder_sparse_step"), keys.read("mlp_only_layers", list, [])
    if dense_layers != [*range(len(dense_layers))]:
        raise CheckpointError(
            f"{keys.describe('mlp_only_layers')} is not supported, only the first blocks: [0, 1, ...]"
        )
    dense = {"kind": "dense", "hidden_dim": keys.read("intermediate_size", int)}
    mlp = _EXPERTS.to_model(
        keys,
        _num_experts(keys),
        renormalise=keys.read("norm_topk_prob", bool),
        every=every,
        dense_first=len(dense_layers),
        dense=dense if every > 1 or dense_layers else None,
    )
    return decoder.to_model(keys, attention=to_attention(keys), mlp=mlp)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    experts = decoder.experts_of(config, "qwen3_moe")
    return {
        **decoder.to_keys(config, _EXPERTS),
        **attention_keys(config),
        "norm_topk_prob": experts.renormalise,
        "decoder_sparse_step": experts.every,
        "mlp_only_layers": [*range(experts.dense_first)],
    }


LAYOUT = FamilyLayout(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    lambda _: (*decoder.EXPERTS, *decoder.RULES),
    _to_model,
    _to_keys,
    decoder.UNUSED,
    stacked=lambda _: decoder.RULES,
)
