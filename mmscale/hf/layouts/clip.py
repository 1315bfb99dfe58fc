"""A folder of CLIP with both towers, of which the vision tower is read. What is written is a tower alone."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import clip_vision, pixels, vit
from mmscale.models.config import TowerConfig


def _to_model(keys: Keys) -> TowerConfig:
    block = vit.vision_block(keys)
    for name, kind in (("projection_dim", int), ("logit_scale_init_value", float), ("initializer_factor", float)):
        keys.take(name, kind, None)
    vision = clip_vision.to_vision(block)
    block.finish()
    return TowerConfig.model_validate({"vision": {**vision, **pixels.to_model(keys, pixels.CLIP)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    return vit.no_pair("clip", "clip_vision_model")


LAYOUT = Layout(
    "clip",
    "CLIPModel",
    lambda config: vit.clip_rows(vit.tower(config)),
    _to_model,
    _to_keys,
    vit.UNUSED,
    kind=TowerConfig,
    auto_class="AutoModel",
)
