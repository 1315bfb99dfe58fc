"""A folder of SigLIP with both towers, of which the vision tower is read. What is written is a tower alone."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import pixels, siglip_vision, vit
from mmscale.models.config import TowerConfig


def _to_model(keys: Keys) -> TowerConfig:
    block = vit.vision_block(keys)
    keys.take("initializer_factor", float, None)
    vision = siglip_vision.to_vision(block)
    block.finish()
    return TowerConfig.model_validate({"vision": {**vision, **pixels.to_model(keys, pixels.HALF)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    return vit.no_pair("siglip", "siglip_vision_model")


LAYOUT = Layout(
    "siglip",
    "SiglipModel",
    lambda config: vit.clip_rows(vit.tower(config)),
    _to_model,
    _to_keys,
    siglip_vision.UNUSED,
    kind=TowerConfig,
    auto_class="AutoModel",
)
