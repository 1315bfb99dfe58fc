"""Mistral 7B from version 0.2 on, Mistral Nemo: no sliding window."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig


def _to_model(keys: Keys) -> ModelConfig:
    if "sliding_window" not in keys.values:
        raise CheckpointError(f"{keys.where}: sliding_window is missing, which means 4096; only null is supported")
    keys.must_be("sliding_window", None)
    return decoder.to_model(keys)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    return {**decoder.to_keys(config), "sliding_window": None}


LAYOUT = Layout("mistral", "MistralForCausalLM", lambda _: decoder.ROWS, _to_model, _to_keys, decoder.UNUSED)
