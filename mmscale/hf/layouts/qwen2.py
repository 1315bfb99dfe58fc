"""Qwen 1.5 to 2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig


def check_attention(keys: Keys) -> None:
    """Require that every block attends to all earlier tokens of the context.

    Raises:
        CheckpointError: a block has a sliding window shorter than the context, or ``layer_types`` is inconsistent.
    """
    on, kinds = keys.read("use_sliding_window", bool, False), keys.read("layer_types", list, None)
    first, count = keys.read("max_window_layers", int, 0), keys.read("num_hidden_layers", int)
    slides = first < count if kinds is None else "sliding_attention" in kinds
    if kinds is not None and (len(kinds) != count or not {*kinds} <= {"full_attention", *["sliding_attention"] * on}):
        raise CheckpointError(
            f"{keys.describe('layer_types')}: expected 'full_attention' for each of num_hidden_layers={count}, or "
            "'sliding_attention' where use_sliding_window is true"
        )
    decoder.check_window(keys, on and slides)


def _to_model(keys: Keys) -> ModelConfig:
    check_attention(keys)
    return decoder.to_model(keys, attention={"qkv_bias": True})


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "use_sliding_window": False}


LAYOUT = FamilyLayout("qwen2", "Qwen2ForCausalLM", lambda _: decoder.RULES, _to_model, _to_keys, decoder.UNUSED)
