"""Molmo 7B-O, 7B-D, 72B and MolmoE as published: folders for the authors' own code, not for a class of transformers.

``config.json`` of the dense models describes the decoder only; tower, pooling and padding are constants of that code.
For a model with other values, an export adds ``additional_vocab_size``, ``vit_layers`` and ``vision_backbone``. The
training code uses these names (allenai/molmo, olmo/config.py); the published code does not read them. MolmoE's
``config.json`` has all keys of the training code, see ``molmoe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Axes, FamilyLayout, NameRule, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder as decoders
from mmscale.hf.layouts import molmoe, pixels
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.rope import LearnedPositionsConfig, RopeConfig

_ATTENTION = (
    NameRule("self_attn.q_proj.", "att_proj.", part=0),
    NameRule("self_attn.k_proj.", "att_proj.", part=1),
    NameRule("self_attn.v_proj.", "att_proj.", part=2),
    *renames(
        ("self_attn.o_proj.", "attn_out."),
        ("self_attn.q_norm.", "q_norm."),
        ("self_attn.k_norm.", "k_norm."),
        ("input_layernorm.", "attn_norm."),
    ),
)
_DENSE_BLOCK = (
    *_ATTENTION,
    NameRule("mlp.up_proj.", "ff_proj.", part=0),  # The gate is the second half of the tensor.
    NameRule("mlp.gate_proj.", "ff_proj.", part=1),
    *renames(("mlp.down_proj.", "ff_out."), ("post_attention_layernorm.", "ff_norm.")),
)
_EXPERT_BLOCK = (
    *with_prefix(_ATTENTION, theirs=("", "attn.")),
    *renames(("mlp.gate.", "mlp.gate."), ("post_attention_layernorm.", "mlp.ff_norm.")),
)
_VIT_BLOCK = renames(
    ("self_attn.q_proj.", "attention.wq."),
    ("self_attn.k_proj.", "attention.wk."),
    ("self_attn.v_proj.", "attention.wv."),
    ("self_attn.o_proj.", "attention.wo."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("mlp.up_proj.", "feed_forward.w1."),
    ("mlp.down_proj.", "feed_forward.w2."),
)
_VIT = (
    *with_prefix(_VIT_BLOCK, ours=("", "layers.{n}."), theirs=("", "transformer.resblocks.{n}.")),
    *renames(
        ("positions.position_embedding", "positional_embedding"),
        ("positions.class_embedding", "class_embedding"),
        ("pre_norm.", "pre_ln."),
    ),
)
_BACKBONE = (
    *with_prefix(_VIT, ours=("", "vision."), theirs=("", "image_vit.")),
    *renames(
        ("connector.padding.pad_embed", "pad_embed"),
        ("connector.projector.q_proj.", "image_pooling_2d.wq."),
        ("connector.projector.k_proj.", "image_pooling_2d.wk."),
        ("connector.projector.v_proj.", "image_pooling_2d.wv."),
        ("connector.projector.o_proj.", "image_pooling_2d.wo."),
        ("connector.projector.mlp.gate_proj.", "image_projector.w1."),
        ("connector.projector.mlp.down_proj.", "image_projector.w2."),
        ("connector.projector.mlp.up_proj.", "image_projector.w3."),
    ),
)
_BLOCKS = "model.transformer.blocks.{n}."
_RULES = (
    *with_prefix(_BACKBONE, theirs=("", "model.vision_backbone.")),
    *renames(
        ("decoder.embed_tokens.weight", "model.transformer.wte.embedding"),
        ("decoder.embed_tokens.extra_weight", "model.transformer.wte.new_embedding"),
        ("decoder.norm.", "model.transformer.ln_f."),
    ),
)
_DENSE_RULES = (
    *with_prefix(_DENSE_BLOCK, ours=("", "decoder.layers.{n}."), theirs=("", _BLOCKS)),
    *renames(("head.", "model.transformer.ff_out.")),
    *_RULES,
)
_EXPERT_RULES = (
    *decoders.expert_rules(f"{_BLOCKS}mlp.experts."),
    *with_prefix(_EXPERT_BLOCK, ours=("", "decoder.layers.{n}."), theirs=("", _BLOCKS)),
    *renames(("head.", "lm_head.")),
    *_RULES,
)
_NAMES = {name: name for name in molmoe.NAMES}
_NEW_ROWS = 128
_LAYERS = [-2, -9]
_TOWER: dict[str, Any] = {
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_head_dim": 64,
    "image_num_layers": 23,
    "image_mlp_dim": 4096,
    "image_norm_eps": 1e-5,
}
"""CLIP ViT-L/14 at 336 pixels without its last block. Source: olmo/config.py and launch_scripts/utils.py."""


def _rules(config: ModelConfig) -> NameRules:
    assert config.vision is not None
    patches = NameRule(
        "vision.patch_embed.projection.weight",
        "model.vision_backbone.image_vit.patch_embedding.weight",
        axes=Axes((-1, config.vision.patch_size**2, config.vision.channels), (0, 2, 1)),  # Theirs: channels innermost.
    )
    return (patches, *(_EXPERT_RULES if isinstance(config.decoder.mlp, MoeConfig) else _DENSE_RULES))


def _to_model(keys: Keys) -> ModelConfig:
    keys.must_be("layer_norm_type", "rms")
    keys.must_be("use_position_ids", True)
    keys.must_be("clip_qkv", None)
    for name in ("weight_tying", "tie_word_embeddings"):
        keys.must_be(name, False)
    keys.read("auto_map", dict, None)  # Names of the remote code.
    ids = keys.read("vocab_size", int)  # Ids of the tokenizer; the table may have more rows.
    names, experts = _NAMES, None
    if molmoe.COUNT in keys.given:
        names = molmoe.NAMES
        fused, experts = molmoe.to_model(keys)
    else:
        fused = keys.read("intermediate_size", int)
    heads = keys.read(names["num_attention_heads"], int)
    mlp = {"kind": "dense", "hidden_dim": fused // 2}
    decoder = {
        "vocab_size": keys.read("embedding_size", int, ids),
        "extra_tokens": {"rows": keys.read("additional_vocab_size", int, _NEW_ROWS), "predicted": False},
        "hidden_dim": keys.read(names["hidden_size"], int),
        "num_layers": keys.read(names["num_hidden_layers"], int),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": keys.read(names["num_key_value_heads"], int, heads),
            "qkv_bias": keys.read("qkv_bias", bool, False),
            "qk_norm": "full" if keys.read("attention_layer_norm", bool, False) else "none",
        },
        "mlp": experts or mlp,
        "norm": {"kind": "rmsnorm", "eps": keys.read("layer_norm_eps", float)},
        "norm_placement": "post" if keys.read("norm_after", bool, False) else "pre",
        "rope": {"theta": keys.read("rope_theta", float)},
    }
    vision, pool = _vision(keys)
    connector = {
        "kind": "embedding",
        "combine": "add",
        "padding": True,
        "projector": {"kind": "attention_pool", "merge": 2, "mlp": mlp, **pool},
    }
    return ModelConfig.model_validate({"decoder": decoder, "vision": vision, "connector": connector})


def _vision(keys: Keys) -> tuple[dict[str, Any], dict[str, int]]:
    """Return ``vision`` and the attention heads of the pooling, which equal the tower's."""
    found = keys.optional_object("vision_backbone") or Keys({}, keys.where)
    size = {name: found.read(name, type(default), default) for name, default in _TOWER.items()}
    for name in ("image_patch_size", "image_num_layers"):  # They are divisors below.
        found.positive_int(name, default=_TOWER[name])
    molmoe.check_tower(found, size)
    found.raise_on_unread()
    layers, count = keys.read("vit_layers", list, _LAYERS), size["image_num_layers"]
    feature_layers = [layer % count for layer in layers]
    pool = {"num_heads": size["image_num_heads"], "head_dim": size["image_head_dim"]}
    vision = {
        "patch_size": size["image_patch_size"],
        **pixels.to_model(keys, pixels.CLIP),
        "hidden_dim": size["image_emb_dim"],
        "num_layers": count,
        "attention": {**pool, "qkv_bias": True, "out_bias": True},
        "mlp": {
            "kind": "dense",
            "hidden_dim": size["image_mlp_dim"],
            "activation": "quick_gelu",
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": size["image_norm_eps"]},
        "positions": {
            "kind": "learned",
            "grid": [side // size["image_patch_size"] for side in size["image_default_input_size"]],
        },
        "class_token": True,
        "pre_norm": True,
        "post_norm": False,
        "feature_layers": feature_layers,
        "last_output": False,
        "idle_layers": count - 1 - max(feature_layers),
    }
    return vision, pool


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    decoder, vision = config.decoder, config.vision
    if not isinstance(vision, VisionConfig) or not isinstance(config.connector, EmbeddingConnectorConfig):
        raise CheckpointError("molmo holds models with a vision tower and connector.kind=embedding")
    if decoder.extra_tokens is None:
        raise CheckpointError("molmo holds decoders with decoder.extra_tokens")
    names, widths, tower = _NAMES, dict[str, Any](), _TOWER
    if isinstance(decoder.mlp, DenseMlpConfig):
        widths = {"intermediate_size": 2 * decoder.mlp.hidden_dim, "tie_word_embeddings": False}
    else:
        names, widths, tower = molmoe.NAMES, molmoe.to_keys(decoder.mlp), {}  # MolmoE's file describes every tower.
    values = {
        "vocab_size": decoder.vocab_size,
        "embedding_size": decoder.vocab_size,
        names["hidden_size"]: decoder.hidden_dim,
        names["num_hidden_layers"]: decoder.num_layers,
        names["num_attention_heads"]: decoder.attention.num_heads,
        names["num_key_value_heads"]: decoder.attention.kv_heads,
        **widths,
        "qkv_bias": decoder.attention.qkv_bias,
        "attention_layer_norm": decoder.attention.qk_norm.value == "full",
        "layer_norm_type": "rms",
        "layer_norm_eps": decoder.norm.eps,
        "norm_after": decoder.norm_placement.value == "post",
        "rope_theta": (decoder.rope or RopeConfig()).theta,
        "clip_qkv": None,
        "use_position_ids": True,
        "weight_tying": False,
    }
    if decoder.extra_tokens.rows != _NEW_ROWS:
        values["additional_vocab_size"] = decoder.extra_tokens.rows
    return {**values, **_vision_keys(vision, tower)}


def _vision_keys(vision: VisionConfig, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of tower and image processor; those of the tower only if they differ from ``usual``."""
    if not isinstance(vision.positions, LearnedPositionsConfig):
        raise CheckpointError("molmo holds towers with learned positions (vision.positions.kind=learned)")
    side = [patches * vision.patch_size for patches in vision.positions.grid]
    size = {
        "image_default_input_size": side,
        "image_patch_size": vision.patch_size,
        "image_emb_dim": vision.hidden_dim,
        "image_num_heads": vision.attention.num_heads,
        "image_head_dim": vision.attention.resolved_head_dim(vision.hidden_dim),
        "image_num_layers": vision.num_layers,
        "image_mlp_dim": vision.mlp.hidden_dim,
        "image_norm_eps": vision.norm.eps,
    }
    layers = [layer - vision.num_layers for layer in vision.feature_layers]
    other: dict[str, Any] = {} if size == usual else {"vision_backbone": size}
    other |= {} if layers == _LAYERS and usual else {"vit_layers": layers}
    return {**other, **pixels.to_keys(vision, base_image_input_size=side, image_patch_size=vision.patch_size)}


def _images(source: ImageSource) -> ImageInput:
    layout = {"crop_start": "<im_start>", "crop_end": "<im_end>", "row_end": "<im_col>", "join_tiles": True}
    tiling = {"kind": "molmo", "padding_of": "next_crop"}
    return ImageInput(
        {"kind": "tiles", "interpolation": "bilinear_float", "tiling": tiling, "layout": layout}, tokens=("<im_patch>",)
    )


LAYOUT = FamilyLayout(
    "molmo",
    "MolmoForCausalLM",
    _rules,
    _to_model,
    _to_keys,
    auto_class=None,
    images=_images,
)
