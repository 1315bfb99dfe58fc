"""InternViT in transformers' format: QK norms over the full width, layer scale on both branches."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import pixels, vit
from mmscale.models.config import TowerConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import NormKind, QkNorm

NORMS = {"rms_norm": "rmsnorm", "layer_norm": "layernorm"}
_QK_EPS = 1e-6
"""Epsilon of the QK norms; transformers does not use ``layer_norm_eps`` for them."""
_LAYER = "encoder.layer.{n}."
UNUSED = (r"embeddings\.mask_token",)
"""Vector of masked patches, for a training objective that transformers lacks."""


def rules(vision: VisionConfig) -> NameRules:
    """Return the name rules of a tower without a prefix on their side."""
    width = vision.hidden_dim
    return (
        vit.convolution("embeddings.patch_embeddings.projection.weight", vision),
        NameRule("vision.positions.class_embedding", "embeddings.cls_token", (1, 1, width)),
        NameRule("vision.positions.position_embedding", "embeddings.position_embeddings", (1, -1, width)),
        *renames(
            ("vision.patch_embed.projection.", "embeddings.patch_embeddings.projection."),
            ("vision.post_norm.", "layernorm."),
            ("vision.layers.{n}.input_layernorm.", f"{_LAYER}layernorm_before."),
            ("vision.layers.{n}.post_attention_layernorm.", f"{_LAYER}layernorm_after."),
            ("vision.layers.{n}.attention_scale.weight", f"{_LAYER}lambda_1"),
            ("vision.layers.{n}.mlp_scale.weight", f"{_LAYER}lambda_2"),
            ("vision.layers.{n}.self_attn.o_proj.", f"{_LAYER}attention.projection_layer."),
            ("vision.layers.{n}.self_attn.", f"{_LAYER}attention."),
            ("vision.layers.{n}.mlp.up_proj.", f"{_LAYER}mlp.fc1."),
            ("vision.layers.{n}.mlp.down_proj.", f"{_LAYER}mlp.fc2."),
        ),
    )


def to_vision(keys: Keys, *, qk_norm: bool, qkv_bias: bool, qk_eps: float | None, **more: Any) -> dict[str, Any]:
    """Return ``vision`` without ``mean`` and ``std``.

    Args:
        keys: Keys of the tower.
        qk_norm: Whether queries and keys are normalised.
        qkv_bias: Whether queries, keys and values have biases.
        qk_eps: Epsilon of the QK norms; None for that of the blocks' norms.
        **more: Further fields of ``vision``.

    Raises:
        CheckpointError: a key needs a computation that our towers lack.
    """
    kind = keys.read("norm_type", str)
    if kind not in NORMS:
        raise CheckpointError(f"{keys.where}: norm_type={kind!r} is not supported, only {', '.join(NORMS)}")
    attention: dict[str, Any] = {"qkv_bias": qkv_bias, "out_bias": True}
    vision = vit.to_vision(keys, attention=attention, class_token=True, patch_bias=True, **more)
    vision["norm"]["kind"] = NORMS[kind]
    if qk_norm:
        eps = vision["norm"]["eps"] if qk_eps is None else qk_eps
        vision["attention"] |= {"qk_norm": "full", "qk_norm_config": {"kind": "rmsnorm", "eps": eps}}
    return vision


def to_tower(keys: Keys) -> dict[str, Any]:
    """Return ``vision`` of a tower in transformers' format, without ``mean`` and ``std``.

    Raises:
        CheckpointError: a key needs a computation that our towers lack.
    """
    for name in ("hidden_dropout_prob", "projection_dropout"):
        keys.must_be(name, 0.0)
    keys.must_be("use_absolute_position_embeddings", True)
    keys.read("use_mask_token", bool)
    mean_pooling = keys.read("use_mean_pooling", bool)
    vision = to_vision(
        keys,
        qk_norm=keys.read("use_qk_norm", bool),
        qkv_bias=keys.read("attention_bias", bool),
        qk_eps=_QK_EPS,
        layer_scale=keys.read("layer_scale_init_value", float),
        post_norm=not mean_pooling,
    )
    if not mean_pooling and vision["norm"]["kind"] != NormKind.LAYER:
        raise CheckpointError(f"{keys.where}: use_mean_pooling=False adds a layer norm and needs norm_type=layer_norm")
    return vision


def _to_model(keys: Keys) -> TowerConfig:
    return TowerConfig.model_validate({"vision": {**to_tower(keys), **pixels.to_model(keys, pixels.IMAGENET)}})


def tower_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of a tower."""
    size = vit.image_size(vision)
    return {
        **vit.to_keys(vision),
        "image_size": [size, size],
        "patch_size": [vision.patch_size, vision.patch_size],
        "attention_bias": vision.attention.qkv_bias,
        "use_qk_norm": vision.attention.qk_norm is not QkNorm.NONE,
        "norm_type": norm_type(vision),
        "layer_scale_init_value": 0.1 if vision.layer_scale is None else vision.layer_scale,
        "hidden_dropout_prob": 0.0,
        "projection_dropout": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": not vision.post_norm,
    }


def norm_type(vision: VisionConfig) -> str:
    """Return ``norm_type`` for the kind of the blocks' norms."""
    return {NormKind(ours): theirs for theirs, ours in NORMS.items()}[vision.norm.kind]


LAYOUT = FamilyLayout(
    "internvl_vision",
    "InternVLVisionModel",
    lambda config: rules(vit.tower(config)),
    _to_model,
    lambda config: {**tower_keys(config.vision), **vit.crop_processor_keys(config.vision)},
    UNUSED,
    kind=TowerConfig,
    auto_class="AutoModel",
)
