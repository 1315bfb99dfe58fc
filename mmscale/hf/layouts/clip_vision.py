"""CLIP's vision tower alone; ``clip`` uses ``to_vision`` too.

transformers applies the last norm to the class token only, for the contrastive loss. mmscale applies it to every row
and drops the class row: features are ``post_layernorm(last_hidden_state)[:, 1:]``. For features without this norm
(LLaVA, Molmo), build fewer blocks with ``last_output: false`` and load the tower's weights into them.
"""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import pixels, vit
from mmscale.models.config import TowerConfig


def to_vision(keys: Keys) -> dict[str, Any]:
    """Return ``vision`` without ``mean`` and ``std``."""
    keys.must_be("dropout", 0.0)
    keys.read("projection_dim", int, None)  # Features do not pass through the projection.
    keys.read("initializer_factor", float, None)
    return vit.to_vision(keys, attention=vit.ATTENTION_BIASES, class_token=True, pre_norm=True)


def _to_model(keys: Keys) -> TowerConfig:
    return TowerConfig.model_validate({"vision": {**to_vision(keys), **pixels.to_model(keys, pixels.CLIP)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    return {**vit.to_keys(config.vision), **vit.crop_processor_keys(config.vision)}


LAYOUT = FamilyLayout(
    "clip_vision_model",
    "CLIPVisionModel",
    lambda config: vit.clip_rules(vit.tower(config)),
    _to_model,
    _to_keys,
    vit.UNUSED,
    vit.ALIASES,
    TowerConfig,
    "AutoModel",
)
