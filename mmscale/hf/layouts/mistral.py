"""Mistral 7B from version 0.2 on, Mistral Nemo: no sliding window within the context."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig


def _to_model(keys: Keys) -> ModelConfig:
    decoder.check_window(keys)
    if any(kind != "full_attention" for kind in keys.take("layer_types", list, [])):
        keys.must_be("layer_types", ["full_attention"])
    return decoder.to_model(keys)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "sliding_window": None}


LAYOUT = Layout("mistral", "MistralForCausalLM", lambda _: decoder.ROWS, _to_model, _to_keys, decoder.UNUSED)
