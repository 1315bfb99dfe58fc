"""InternViT in its authors' format (``InternVisionModel``): queries, keys and values are fused.

Names and keys are those of the authors' code (OpenGVLab/InternVL, ``modeling_intern_vit.py``). transformers does not
include it and opens such a folder only if the folder contains that code.
"""

from __future__ import annotations

from typing import Any

from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import internvl_vision, pixels, vit
from mmscale.models.config import TowerConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import QkNorm

_LAYER = "encoder.layers.{n}."


def fused_rules(vision: VisionConfig) -> NameRules:
    """Return the name rules without a prefix on their side."""
    width = vision.hidden_dim
    return (
        vit.convolution("embeddings.patch_embedding.weight", vision),
        NameRule("vision.positions.class_embedding", "embeddings.class_embedding", (1, 1, width)),
        NameRule("vision.positions.position_embedding", "embeddings.position_embedding", (1, -1, width)),
        *renames(
            ("vision.patch_embed.projection.", "embeddings.patch_embedding."),
            *((f"vision.layers.{{n}}.self_attn.{name}_proj.", f"{_LAYER}attn.qkv.") for name in "qkv"),
            ("vision.layers.{n}.self_attn.o_proj.", f"{_LAYER}attn.proj."),
            ("vision.layers.{n}.self_attn.", f"{_LAYER}attn."),
            ("vision.layers.{n}.input_layernorm.", f"{_LAYER}norm1."),
            ("vision.layers.{n}.post_attention_layernorm.", f"{_LAYER}norm2."),
            ("vision.layers.{n}.attention_scale.weight", f"{_LAYER}ls1"),
            ("vision.layers.{n}.mlp_scale.weight", f"{_LAYER}ls2"),
            ("vision.layers.{n}.mlp.up_proj.", f"{_LAYER}mlp.fc1."),
            ("vision.layers.{n}.mlp.down_proj.", f"{_LAYER}mlp.fc2."),
        ),
    )


def to_vision(keys: Keys) -> dict[str, Any]:
    """Return ``vision`` without ``mean`` and ``std``."""
    keys.must_be("dropout", 0.0)
    for name, kind in (("drop_path_rate", float), ("use_flash_attn", bool), ("auto_map", dict)):
        keys.read(name, kind, None)  # Training, kernels and remote code do not change the computation.
    factor = keys.read("initializer_factor", float)
    return internvl_vision.to_vision(
        keys,
        qk_norm=keys.read("qk_normalization", bool),
        qkv_bias=keys.read("qkv_bias", bool),
        qk_eps=None,
        layer_scale=factor,
        post_norm=False,
    )


def to_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of a tower."""
    return {
        **vit.to_keys(vision),
        "qkv_bias": vision.attention.qkv_bias,
        "qk_normalization": vision.attention.qk_norm is not QkNorm.NONE,
        "norm_type": internvl_vision.norm_type(vision),
        "initializer_factor": 0.1 if vision.layer_scale is None else vision.layer_scale,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "use_flash_attn": True,
    }


def _to_model(keys: Keys) -> TowerConfig:
    return TowerConfig.model_validate({"vision": {**to_vision(keys), **pixels.to_model(keys, pixels.IMAGENET)}})


def _to_keys(config: TowerConfig) -> dict[str, Any]:
    return {**to_keys(config.vision), **pixels.to_keys(config.vision)}


LAYOUT = FamilyLayout(
    "intern_vit_6b",
    "InternVisionModel",
    lambda config: fused_rules(vit.tower(config)),
    _to_model,
    _to_keys,
    kind=TowerConfig,
    auto_class=None,
)
