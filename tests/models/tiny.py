"""Tiny models with each kind of connector."""

from __future__ import annotations

from typing import Any

from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel

VOCAB = 61
DENSE = {"kind": "dense", "hidden_dim": 48}
MOE = {"kind": "moe", "num_experts": 6, "experts_per_token": 2, "expert_dim": 24, "shared_dim": 16, "shared_gate": True}
DECODER = {
    "vocab_size": VOCAB,
    "hidden_dim": 32,
    "num_layers": 4,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "mlp": DENSE,
}
VISION = {
    "patch_size": 2,
    "hidden_dim": 24,
    "num_layers": 2,
    "attention": {"num_heads": 2, "qkv_bias": True},
    "mlp": {"kind": "dense", "hidden_dim": 40, "gated": False, "activation": "gelu", "bias": True},
    "norm": {"kind": "layernorm"},
    "positions": {"kind": "rotary_2d"},
}
LEARNED = {**VISION, "positions": {"kind": "learned", "grid": [2, 4]}, "class_token": True, "pre_norm": True}
PATCHES = {"kind": "patches", "patch_size": 2}
TILED = {
    **LEARNED,
    "class_feature": True,
    "feature_layers": [0],
    "feature_order": "channels",
    "tiles": {"max_tiles": 3, "global_layers": 1, "gate_init": 0.4},
}
MERGED = {"kind": "mlp", "merge": 2, "norm": "after_merge"}
POOLED: dict[str, Any] = {"kind": "c_abstractor", "side": 3, "hidden_dim": 32, "depth": 2}
RESAMPLED: dict[str, Any] = {"kind": "resampler", "queries": [[3, 2], [8, 5]], "num_heads": 2}
CONNECTORS: dict[str, dict[str, Any]] = {
    "embedding": {"kind": "embedding", "projector": MERGED},
    "cross_attention": {"kind": "cross_attention", "every": 2, "gate_init": 0.7},
    "hybrid": {"kind": "hybrid", "every": 2, "gate_init": 0.7, "projector": MERGED},
}


def config(
    kind: str | None,
    *,
    mlp: dict[str, Any] = DENSE,
    vision: dict[str, Any] = VISION,
    projector: dict[str, Any] | None = None,
    unseen_text: str | None = None,
    **decoder: Any,
) -> ModelConfig:
    """Return the configuration of a model with the connector ``kind``, or of a text model if it is None."""
    block = {"decoder": {**DECODER, "mlp": mlp, **decoder}}
    if kind is not None:
        connector = CONNECTORS[kind]
        if mlp is not DENSE and kind != "embedding":
            connector = {**connector, "mlp": DENSE}
        if projector is not None:
            connector = {**connector, "projector": projector}
        if unseen_text is not None:
            connector = {**connector, "unseen_text": unseen_text}
        block |= {"vision": vision, "connector": connector}
    return ModelConfig.model_validate(block)


def model(kind: str | None, **options: Any) -> MultimodalModel:
    return build_model(config(kind, **options), seed=5)
