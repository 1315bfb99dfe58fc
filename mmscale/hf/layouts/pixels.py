"""Mean and deviation of pixels, which their ``preprocessor_config.json`` says and the weights were trained with."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.vision_config import PatchesConfig, VisionConfig

Statistics = tuple[float, ...]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Of CLIP's training images, which many kept."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def to_model(keys: Keys, default: tuple[Statistics, Statistics]) -> dict[str, Any]:
    """Of ``vision``, what the folder's processor says; ``default`` where the folder has none or it does not say."""
    block = keys.block(PREPROCESSOR) or Keys({}, keys.where)
    return {"mean": _statistics(block, "image_mean", default[0]), "std": _statistics(block, "image_std", default[1])}


def _statistics(block: Keys, key: str, default: Statistics) -> list[float]:
    """A list, or one number for all channels (Fuyu)."""
    if isinstance(block.values.get(key), float):
        return [block.take(key, float)] * len(default)
    return block.take(key, list, list(default))


def to_keys(vision: VisionConfig | PatchesConfig, **more: Any) -> dict[str, Any]:
    """The processor's file: ``more`` of it, and the statistics."""
    return {PREPROCESSOR: {**more, "image_mean": list(vision.mean), "image_std": list(vision.std)}}
