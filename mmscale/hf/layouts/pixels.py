"""Convert an image processor: mean and std for the model, and ``transforms`` for the data.

A processor computes ``(pixel * rescale_factor - image_mean) / image_std``; rescaling and normalising can be switched
off. Our towers compute ``(pixel / 255 - mean) / std``, which gives the same values for a suitable mean and std.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.vision_config import PatchesConfig, VisionConfig
from mmscale.nn.rope import LearnedPositionsConfig

Statistics = tuple[float, ...]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and std of CLIP's training images; many later towers use them."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's filter number -> ``transforms.interpolation``."""


def to_model(keys: Keys, default: tuple[Statistics, Statistics]) -> dict[str, Any]:
    """Return ``vision.mean`` and ``vision.std`` that normalise pixels as the folder's image processor does.

    Args:
        keys: Keys of the folder, with the image processor under ``preprocessor_config``.
        default: Mean and std for a folder without an image processor.

    Raises:
        CheckpointError: mean, std or rescale factor of the processor is missing or invalid.
    """
    block = keys.optional_object(PREPROCESSOR)
    if block is None:
        return {"mean": list(default[0]), "std": list(default[1])}
    mean, std = [0.0] * len(default[0]), [1.0] * len(default[1])
    if block.read("do_normalize", bool, True):
        mean, std = (_statistics(block, key, len(default[0])) for key in ("image_mean", "image_std"))
    if not all(value > 0 for value in std):
        raise CheckpointError(f"{block.describe('image_std')}: every value must be above 0")
    factor = block.read("rescale_factor", float, 1 / 255) if block.read("do_rescale", bool, True) else 1.0
    if not 0 < factor < math.inf:
        raise CheckpointError(f"{block.describe('rescale_factor')} must be above 0")
    scale = 1.0 if math.isclose(255 * factor, 1.0) else 255 * factor
    return {"mean": [value / scale for value in mean], "std": [value / scale for value in std]}


def _statistics(block: Keys, key: str, channels: int) -> list[float]:
    """Return a value for each channel; the file may have one number for all channels (Fuyu)."""
    value = block.values.get(key)
    if type(value) in (int, float):
        value = [value] * channels
    if type(value) is not list or len(value) != channels or not all(type(each) in (int, float) for each in value):
        raise CheckpointError(f"{block.where}: {key}={value!r} must be a number or a list of {channels} numbers")
    return [float(each) for each in value]


def transforms(values: Mapping[str, Any], where: str, processor: str = PREPROCESSOR) -> dict[str, Any]:
    """Return fields of a data set's ``transforms`` that resize and crop as a processor of the folder does.

    ``do_convert_rgb`` is ignored: mmscale always converts images to RGB.

    Args:
        values: Values of a folder, as ``read_config`` or ``read_processor`` returns them.
        where: File, for messages.
        processor: Key of the processor in ``values``.

    Raises:
        CheckpointError: no transform of mmscale does the same.
    """
    block = Keys(values, where).optional_object(processor)
    if block is None:
        return {}
    if not block.read("do_resize", bool, True):
        raise CheckpointError(f"{block.describe('do_resize')} is not supported: images are always resized here")
    found: dict[str, Any] = {}
    if (number := block.read("resample", int, None)) is not None:
        if number not in _FILTERS:
            known = ", ".join(f"{number} ({name})" for number, name in _FILTERS.items())
            raise CheckpointError(f"{block.describe('resample')} is not supported, only {known}")
        found["interpolation"] = _FILTERS[number]
    size = block.values.get("size")
    shortest = size if isinstance(size, int) else size.get("shortest_edge") if isinstance(size, Mapping) else None
    # With both keys, Hugging Face's names mislead: they bound the number of pixels of the whole image.
    longest = size.get("longest_edge") if isinstance(size, Mapping) else None
    bounds_area = shortest is not None and longest is not None
    if bounds_area:
        found |= {"min_pixels": shortest, "max_pixels": longest}
    for key in ("min_pixels", "max_pixels"):  # They override ``size``.
        if (pixels := block.read(key, int, None)) is not None:
            found[key] = pixels
    if bounds_area:
        return found
    if block.read("do_center_crop", bool, shortest is not None):
        _check_crop(block, size, shortest)
        found |= {} if shortest is None else {"crop": "center"}
    return found


def _check_crop(block: Keys, size: Any, shortest: Any) -> None:
    """Require that the crop has the size that images are resized to."""
    crop = block.values.get("crop_size", size)
    sides = list(crop.values()) if isinstance(crop, Mapping) else [crop]
    resized = [shortest] if shortest is not None else list(size.values()) if isinstance(size, Mapping) else []
    if resized and {*sides} != {*resized}:
        raise CheckpointError(
            f"{block.describe('crop_size')} is not the size that images are resized to ({size!r}); no transform "
            "supports this crop"
        )


def fixed_images(source: ImageSource, template: dict[str, Any] | None = None) -> ImageInput:
    """Return the images of a tower with one fixed size: ``transforms.kind: fixed``."""
    found = transforms(source.values, source.where)
    own = {key: value for key, value in found.items() if key in ("interpolation", "crop")}
    return ImageInput({"kind": "fixed", "interpolation": "bicubic", **own}, template=template, notes=size_notes(source))


def size_notes(source: ImageSource) -> tuple[str, ...]:
    """Return a sentence if the processor's images are larger or smaller than those of a tower with one fixed size."""
    vision = source.config.vision
    if isinstance(vision, VisionConfig) and isinstance(vision.positions, LearnedPositionsConfig):
        tower = vision.positions.grid[0] * vision.patch_size
        made = set(sides((source.values.get(PREPROCESSOR) or {}).get("size")))
        if made and made != {tower}:
            return (
                f"the image processor makes images of {max(made)} pixels, of which the tower reads {tower}; images are "
                f"resized to {tower} here, so pixels differ",
            )
    return ()


def sides(size: Any) -> list[int]:
    """Return the whole numbers of a processor's ``size``: one number, or an object of numbers."""
    values = size.values() if isinstance(size, Mapping) else [size]
    return [value for value in values if type(value) is int]


def to_keys(vision: VisionConfig | PatchesConfig, **more: Any) -> dict[str, Any]:
    """Return ``preprocessor_config`` with mean, std and the keys of ``more``."""
    return {PREPROCESSOR: {**more, "image_mean": list(vision.mean), "image_std": list(vision.std)}}
