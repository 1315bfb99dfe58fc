"""Mean and deviation of pixels, which their ``preprocessor_config.json`` says and the weights were trained with."""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import VisionConfig

Statistics = tuple[float, ...]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Of CLIP's training images, which many kept."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def to_model(keys: Keys, default: tuple[Statistics, Statistics]) -> dict[str, Any]:
    """Of ``vision``, what the folder's processor says; ``default`` where the folder has none or it does not say."""
    block = keys.block(PREPROCESSOR) or Keys({}, keys.where)
    found = (block.take("image_mean", list, list(default[0])), block.take("image_std", list, list(default[1])))
    return dict(zip(("mean", "std"), found, strict=True))


def to_keys(vision: VisionConfig, **more: Any) -> dict[str, Any]:
    """The processor's file: ``more`` of it, and the statistics."""
    return {PREPROCESSOR: {**more, "image_mean": list(vision.mean), "image_std": list(vision.std)}}
