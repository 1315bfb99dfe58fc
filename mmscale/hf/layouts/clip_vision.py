"""CLIP's vision tower by itself; what it reads is a part of ``clip``, too.

Its last norm stands over the class token alone, for the contrastive loss. Ours stands over every row, and the class row
is dropped: features are ``post_layernorm(last_hidden_state)[:, 1:]``. Who wants them without it (LLaVA, Molmo) builds
fewer blocks with ``last_output: false`` and takes the tower's weights into that.
"""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout
from mmscale.hf.layouts import pixels, vit
from mmscale.models.config import TowerConfig


def to_vision(keys: Keys) -> dict[str, Any]:
    """Of ``vision``, without the statistics of pixels."""
    keys.must_be("dropout", 0.0)
    keys.take("projection_dim", int, None)  # Of the projection behind the class token, which features do not pass.
    keys.take("initializer_factor", float, None)
    return vit.to_vision(keys, attention=vit.BIASED, class_token=True, pre_norm=True)


def _to_model(keys: Keys) -> TowerConfig:
    return TowerConfig.model_validate({"vision": {**to_vision(keys), **pixels.to_model(keys, pixels.CLIP)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    return {**vit.to_keys(config.vision), **vit.cropped(config.vision)}


LAYOUT = Layout(
    "clip_vision_model",
    "CLIPVisionModel",
    lambda config: vit.clip_rows(vit.tower(config)),
    _to_model,
    _to_keys,
    vit.UNUSED,
    vit.SPELLINGS,
    TowerConfig,
    "AutoModel",
)
