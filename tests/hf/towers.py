"""Tiny random vision towers of transformers, one for each property in which families differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.reference_models import randomise
from tests.models.test_parity import vision_media

SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "patch_size": 7,
}
RMS = {"norm_type": "rms_norm", "use_qk_norm": True}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPVision", {"image_size": 28}),
    "clip, gelu": ("CLIPVision", {"image_size": 21, "hidden_act": "gelu"}),
    "siglip": ("SiglipVision", {"image_size": 28}),
    "siglip, pixels left over": ("SiglipVision", {"image_size": 30, "vision_use_head": False}),
    "internvl": ("InternVLVision", {"image_size": [28, 28], **RMS, "patch_size": [7, 7]}),
    "internvl, biased": (
        "InternVLVision",
        {"image_size": [28, 28], "patch_size": [7, 7], "attention_bias": True, "use_mean_pooling": False},
    ),
}
PIXELS = {  # Mean and std that the layouts use for a folder without a processor.
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def reference_model(name: str, seed: int = 0) -> Any:
    """Return one of ``TOWERS`` without parameters at 0 or 1."""
    import transformers

    kind, keys = TOWERS[name]
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**{**SIZES, **keys}))
    randomise(model, seed)
    return model


def saved_reference(name: str, folder: Path) -> Any:
    """Return the tower after transformers has saved it to ``folder``."""
    model = reference_model(name)
    model.save_pretrained(folder)
    return model


def images(side: int, count: int = 3) -> Tensor:
    """Return uint8 pixels, ``(count, 3, side, side)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def ours_of(pixels: Tensor, patch: int) -> Any:
    """Return the media block of whole images."""
    count, channels, side, _ = pixels.shape
    places = side // patch
    cut = pixels.view(count, channels, places, patch, places, patch).permute(0, 2, 4, 1, 3, 5)
    return vision_media(cut.reshape(-1, channels * patch**2), ((1, places, places),) * count)


def normalised(pixels: Tensor, family: str) -> Tensor:
    """Return the pixels as an image processor normalises them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in PIXELS[family])
    return (pixels / 255 - mean) / std


def features(theirs: Any, values: Tensor) -> Tensor:
    """Return the features of a multimodal model, packed: the last output after the norm, without the class row."""
    rows = theirs(pixel_values=values).last_hidden_state
    if theirs.config.model_type == "clip_vision_model":
        rows = theirs.post_layernorm(rows)
    if theirs.config.model_type != "siglip_vision_model":
        rows = rows[:, 1:]
    return rows.flatten(0, 1)


def published_places(tower: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return parameters of an InternViT of transformers by its authors' names, with fused queries, keys and values.

    The table of names is independent of the one under test.
    """
    places: dict[str, list[nn.Parameter]] = {}
    for name, parameter in tower.named_parameters():
        name = name.replace("cls_token", "class_embedding").replace("position_embeddings", "position_embedding")
        name = name.replace("patch_embeddings.projection", "patch_embedding")
        name = name.replace("encoder.layer.", "encoder.layers.").replace(".attention.", ".attn.")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2").replace("lambda_", "ls")
        name = name.replace("projection_layer", "proj")
        places.setdefault(re.sub("[qkv]_proj", "qkv", name), []).append(parameter)
    return places
