"""Import the vision tower from a SigLIP folder with both towers. Exports use ``siglip_vision`` (the tower alone).

mmscale does not support SigLIP with both towers: SigLIP's text tower attends in both directions over lines padded to a
fixed length, and its vision tower pools the image by attention. CLIP with both towers is supported (``clip``).
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import pixels, siglip_vision, vit
from mmscale.models.config import TowerConfig


def _to_model(keys: Keys) -> TowerConfig:
    keys.read("text_config", dict, None)
    keys.read("text_config_dict", dict, None)
    block = vit.tower_keys(keys, "vision_config", "siglip_vision_model")
    keys.read("initializer_factor", float, None)
    vision = siglip_vision.to_vision(block)
    block.raise_on_unread()
    return TowerConfig.model_validate({"vision": {**vision, **pixels.to_model(keys, pixels.HALF)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    raise CheckpointError("siglip has a text tower that mmscale lacks; export the vision tower as siglip_vision_model")


LAYOUT = FamilyLayout(
    "siglip",
    "SiglipModel",
    lambda config: vit.clip_rules(vit.tower(config)),
    _to_model,
    _to_keys,
    siglip_vision.UNUSED,
    kind=TowerConfig,
    auto_class="AutoModel",
)
