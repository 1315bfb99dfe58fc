"""Vision towers with a fixed image size, without padding on either side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.families.pair import ModelPair, our_model, randomise
from data_pipeline.batch import MediaBlock, Segments

SIDE, PATCH, IMAGES = 168, 14, 8
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPVision", {"image_size": SIDE, "patch_size": PATCH}),
    "siglip": ("SiglipVision", {"image_size": SIDE, "patch_size": PATCH, "vision_use_head": False}),
    "internvit": (
        "InternVLVision",
        {"image_size": [SIDE] * 2, "patch_size": [PATCH] * 2, "norm_type": "rms_norm", "use_qk_norm": True},
    ),
}


def tower(family: str) -> ModelPair:
    """Return one family on images of equal size."""
    import transformers

    kind, keys = FAMILIES[family]
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SIZES, **keys))
    randomise(theirs)
    ours = our_model(theirs)
    pixels = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    media = _media(pixels)
    vision = ours.config.vision
    mean, std = (torch.tensor(values)[:, None, None] for values in (vision.mean, vision.std))
    values = (pixels / 255 - mean) / std

    def run_theirs() -> torch.Tensor:
        rows = theirs(pixel_values=values).last_hidden_state
        if family == "clip":
            rows = getattr(theirs, "vision_model", theirs).post_layernorm(rows)
        return (rows if family == "siglip" else rows[:, 1:]).flatten(0, 1)

    name = f"{family}, {IMAGES} images of {(SIDE // PATCH) ** 2} patches"
    return ModelPair(name, ours, theirs, lambda: ours.vision(media), run_theirs, {"ours": 0.0, "transformers": 0.0})


def _media(pixels: torch.Tensor) -> MediaBlock:
    places = SIDE // PATCH
    cut = pixels.view(IMAGES, 3, places, PATCH, places, PATCH).permute(0, 2, 4, 1, 3, 5)
    grids = ((1, places, places),) * IMAGES
    empty, none = torch.empty(0, dtype=torch.int64), Segments.from_lengths([])
    items = Segments.from_lengths([places**2] * IMAGES)
    values = cut.reshape(-1, 3 * PATCH**2)
    return MediaBlock(values, torch.tensor(grids), grids, items, empty, empty, empty, none, none)


def pairs() -> Iterator[tuple[str, Any]]:
    """Yield (family, builder of a pair)."""
    for family in FAMILIES:
        yield family, lambda family=family: tower(family)
