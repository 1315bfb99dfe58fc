"""A folder of SigLIP with both towers, of which the vision tower is read. What is written is a tower alone.

The pair is none of our models: its text tower sees both ways over a line that is padded to a fixed length, and a head
of attention pools the image. CLIP's pair is one (``clip``).
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import pixels, siglip_vision, vit
from mmscale.models.config import TowerConfig


def _to_model(keys: Keys) -> TowerConfig:
    keys.take("text_config", dict, None)
    keys.take("text_config_dict", dict, None)
    block = vit.tower_block(keys, "vision_config", "siglip_vision_model")
    keys.take("initializer_factor", float, None)
    vision = siglip_vision.to_vision(block)
    block.finish()
    return TowerConfig.model_validate({"vision": {**vision, **pixels.to_model(keys, pixels.HALF)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    raise CheckpointError("siglip is a pair whose text tower is not ours; export the tower as siglip_vision_model")


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
