"""Qwen 1.5 to 2.5: biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig


def check_attention(keys: Keys) -> None:
    """That every block attends all that came before.

    Raises:
        CheckpointError: a key asks for a window.
    """
    keys.must_be("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):  # Of no effect without it.
        keys.take(name, int, None)
    if any(kind != "full_attention" for kind in keys.take("layer_types", list, [])):
        keys.must_be("layer_types", ["full_attention"])


def _to_model(keys: Keys) -> ModelConfig:
    check_attention(keys)
    return decoder.to_model(keys, attention={"qkv_bias": True})


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "use_sliding_window": False}


LAYOUT = Layout("qwen2", "Qwen2ForCausalLM", lambda _: decoder.ROWS, _to_model, _to_keys, decoder.UNUSED)
