"""SigLIP's vision tower, alone or in a folder of the whole model.

Its head pools all rows into one vector for the contrastive loss. Features do not pass through it, so an import drops
its tensors, and an export sets ``vision_use_head`` to false.
"""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout
from mmscale.hf.layouts import pixels, vit
from mmscale.models.config import TowerConfig

UNUSED = (*vit.UNUSED, r"vision_model\.head\..*")


def to_vision(keys: Keys) -> dict[str, Any]:
    """Return ``vision`` without ``mean`` and ``std``."""
    keys.read("vision_use_head", bool, None)
    return vit.to_vision(keys, attention=vit.ATTENTION_BIASES, patch_bias=True)


def _to_model(keys: Keys) -> TowerConfig:
    return TowerConfig.model_validate({"vision": {**to_vision(keys), **pixels.to_model(keys, pixels.HALF)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    size = vit.image_size(config.vision)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    return {**vit.to_keys(config.vision), "vision_use_head": False, **pixels.to_keys(config.vision, **processor)}


LAYOUT = FamilyLayout(
    "siglip_vision_model",
    "SiglipVisionModel",
    lambda config: vit.clip_rules(vit.tower(config)),
    _to_model,
    _to_keys,
    UNUSED,
    vit.ALIASES,
    TowerConfig,
    "AutoModel",
)
