"""Mistral 7B from version 0.2 on and Mistral Nemo. A sliding window shorter than the context is rejected."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig


def _to_model(keys: Keys) -> ModelConfig:
    decoder.check_window(keys)
    if any(kind != "full_attention" for kind in keys.read("layer_types", list, [])):
        keys.must_be("layer_types", ["full_attention"])
    return decoder.to_model(keys)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "sliding_window": None}


LAYOUT = FamilyLayout("mistral", "MistralForCausalLM", lambda _: decoder.RULES, _to_model, _to_keys, decoder.UNUSED)
