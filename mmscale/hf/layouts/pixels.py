"""What an image processor does to pixels: statistics for the model, and the words for ``transforms`` of the data.

A processor computes ``(pixel * rescale_factor - image_mean) / image_std``, any part of which can be off. Our towers
compute ``(pixel / 255 - mean) / std``, which has the same values for a suitable mean and std.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.vision_config import PatchesConfig, VisionConfig

Statistics = tuple[float, ...]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Of CLIP's training images, which many kept."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Numbers of Pillow -> ``transforms.interpolation``."""


def to_model(keys: Keys, default: tuple[Statistics, Statistics]) -> dict[str, Any]:
    """``vision.mean`` and ``vision.std``, for which our towers see what the folder's processor makes of pixels.

    Args:
        keys: Of a folder.
        default: Mean and std where the folder has no processor.

    Raises:
        CheckpointError: the processor normalises and does not say with which values.
    """
    block = keys.block(PREPROCESSOR)
    if block is None:
        return {"mean": list(default[0]), "std": list(default[1])}
    mean, std = [0.0] * len(default[0]), [1.0] * len(default[1])
    if block.take("do_normalize", bool, True):
        mean, std = (_statistics(block, key, len(default[0])) for key in ("image_mean", "image_std"))
    if not all(value > 0 for value in std):
        raise CheckpointError(f"{block.said('image_std')}: every value must be above 0")
    factor = block.take("rescale_factor", float, 1 / 255) if block.take("do_rescale", bool, True) else 1.0
    if not 0 < factor < math.inf:
        raise CheckpointError(f"{block.said('rescale_factor')} must be above 0")
    scale = 1.0 if math.isclose(255 * factor, 1.0) else 255 * factor
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}


def _statistics(block: Keys, key: str, channels: int) -> list[float]:
    """A list, or one number for all channels (Fuyu)."""
    value = block.values.get(key)
    if type(value) in (int, float):
        value = [value] * channels
    if type(value) is not list or len(value) != channels or not all(type(each) in (int, float) for each in value):
        raise CheckpointError(f"{block.where}: {key}={value!r} must be a number or a list of {channels} numbers")
    return [float(each) for each in value]


def transforms(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the folder's processor does before it normalises, in the words of ``transforms`` of a data set.

    Images are always converted to RGB, so ``do_convert_rgb`` changes nothing where a processor takes an image at all.

    Args:
        values: Of a folder, as ``read_config`` gives them.
        where: File, for messages.

    Raises:
        CheckpointError: no transform cuts images in that way.
    """
    block = Keys(values, where).block(PREPROCESSOR)
    if block is None:
        return {}
    if not block.take("do_resize", bool, True):
        raise CheckpointError(f"{block.said('do_resize')} is not supported: images are always resized here")
    found: dict[str, Any] = {}
    if (number := block.take("resample", int, None)) is not None:
        if number not in _FILTERS:
            raise CheckpointError(f"{block.said('resample')} is not supported, only 2 (bilinear) and 3 (bicubic)")
        found["interpolation"] = _FILTERS[number]
    size = block.values.get("size")
    shortest = size if isinstance(size, int) else size.get("shortest_edge") if isinstance(size, Mapping) else None
    if isinstance(size, Mapping) and shortest is not None and "longest_edge" in size:  # Bounds of an area.
        return {**found, "min_pixels": shortest, "max_pixels": size["longest_edge"]}
    for key in ("min_pixels", "max_pixels"):
        if (pixels := block.take(key, int, None)) is not None:
            found[key] = pixels
    if block.take("do_center_crop", bool, shortest is not None):
        _check_crop(block, size, shortest)
        found |= {} if shortest is None else {"crop": "center"}
    return found


def _check_crop(block: Keys, size: Any, shortest: Any) -> None:
    """Require that the crop is as large as what the image is resized to."""
    crop = block.values.get("crop_size", size)
    sides = list(crop.values()) if isinstance(crop, Mapping) else [crop]
    resized = [shortest] if shortest is not None else list(size.values()) if isinstance(size, Mapping) else []
    if resized and {*sides} != {*resized}:
        raise CheckpointError(
            f"{block.said('crop_size')} is not the size that images are resized to ({size!r}); no transform cuts so"
        )


def to_keys(vision: VisionConfig | PatchesConfig, **more: Any) -> dict[str, Any]:
    """The processor's file: ``more`` of it, and the statistics."""
    return {PREPROCESSOR: {**more, "image_mean": list(vision.mean), "image_std": list(vision.std)}}
