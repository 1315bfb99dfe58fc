"""NVLM-D 72B as NVIDIA publishes it: InternViT, pixel shuffle and an MLP before Qwen2.

The published tower has 7 dummy heads more than InternViT, so that 8 divides the number of heads. Their weights are
zero: an import raises if one of their matrices is not and drops all their values, and an export writes zeros.
transformers has no class for this family; the published folder and vLLM contain the code that reads it.

Source: keys, names and order of the pixel shuffle from the published configuration, index and ``modeling_nvlm_d.py``;
the position of the 7 heads, after the others, from vLLM's ``intern_vit.py``.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder, intern_vit_6b, pixels, vit
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, MlpProjectorConfig
from mmscale.models.vision_config import VisionConfig

_DUMMY_HEADS = 7
_QWEN2 = ["Qwen2ForCausalLM"]


def _rules(config: ModelConfig) -> NameRules:
    assert isinstance(config.vision, VisionConfig)
    return (
        *with_prefix(_padded_rules(config.vision), theirs=("", "vision_model.")),
        *with_prefix(intern_vit_6b.fused_rules(config.vision), theirs=("", "vision_model.")),
        *renames(
            ("connector.projector.norm.", "mlp1.0."),
            ("connector.projector.fc1.", "mlp1.1."),
            ("connector.projector.fc2.", "mlp1.3."),
        ),
        *with_prefix(decoder.RULES, theirs=("", "language_model.")),
    )


def _padded_rules(vision: VisionConfig) -> NameRules:
    """Return the rules of the tensors that include the dummy heads."""
    width, attention = vision.hidden_dim, "vision.layers.{n}.self_attn."
    zeros = _DUMMY_HEADS * (width // vision.attention.num_heads)
    heads = width + zeros
    theirs = "encoder.layers.{n}.attn."
    fused = [
        row
        for part in "qkv"
        for row in (
            NameRule(f"{attention}{part}_proj.weight", f"{theirs}qkv.weight", (3 * heads, width), zeros=zeros * width),
            NameRule(f"{attention}{part}_proj.bias", f"{theirs}qkv.bias", (3 * heads,), zeros=zeros),
        )
    ]
    return (
        *fused,
        NameRule(f"{attention}o_proj.weight", f"{theirs}proj.weight", (width, heads), block=1, zeros=zeros),
        NameRule(f"{attention}q_norm.weight", f"{theirs}q_norm.weight", (heads,), zeros=zeros),
        NameRule(f"{attention}k_norm.weight", f"{theirs}k_norm.weight", (heads,), zeros=zeros),
    )


def _to_model(keys: Keys) -> ModelConfig:
    if keys.read("ps_version", str, "v1") != "v2":
        raise CheckpointError(f"{keys.where}: ps_version must be 'v2'; 'v1', the default, transposes the image")
    keys.must_be("select_layer", -1)
    keys.must_be("downsample_ratio", 0.5)
    for name in ("use_backbone_lora", "use_llm_lora"):
        keys.must_be(name, 0)
    # The data configuration sets tiling and chat format.
    for name, kind in (("dynamic_image_size", bool), ("use_thumbnail", bool), ("template", str), ("auto_map", dict)):
        keys.read(name, kind, None)
    for name in ("min_dynamic_patch", "max_dynamic_patch"):
        keys.read(name, int, None)
    block = keys.required_object("vision_config", "intern_vit_6b")
    vision = intern_vit_6b.to_vision(block)
    block.read("use_bfloat16", bool, None)
    block.raise_on_unread()
    side = vision["positions"]["grid"][0] * vision["patch_size"]
    keys.must_be("force_image_size", side)
    text = _text(keys)
    projector = {
        "kind": "mlp",
        "merge": 2,
        "norm": "after_merge",
        "norm_eps": 1e-5,
        "bias": False,
        "hidden_dim": text["mlp"]["hidden_dim"],
    }
    return ModelConfig.model_validate(
        {
            "decoder": text,
            "vision": {**vision, **pixels.to_model(keys, pixels.IMAGENET)},
            "connector": {"kind": "embedding", "projector": projector},
        }
    )


def _text(keys: Keys) -> dict[str, Any]:
    """Return ``decoder``. The published code builds Qwen2 whatever ``model_type`` is."""
    values = keys.read("llm_config", dict)
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "dynamic":
        # Dynamic scaling changes texts beyond max_position_embeddings only, and Qwen2's code of that time ignored it.
        values = {key: value for key, value in values.items() if key != "rope_scaling"}
    block = Keys(values, f"{keys.where}: llm_config", "qwen2")
    if (kind := block.read("architectures", list)) != _QWEN2:
        raise CheckpointError(f"{block.where}: architectures={kind!r} is not supported, only {_QWEN2!r}")
    block.must_be("attention_bias", True)
    block.must_be("mlp_bias", False)
    block.must_be("use_sliding_window", False)
    block.read("use_bfloat16", bool, None)
    text = decoder.to_model(block, attention={"qkv_bias": True})
    block.raise_on_unread()
    return text.model_dump(mode="json")["decoder"]


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    if not isinstance(config.vision, VisionConfig) or not isinstance(config.connector, EmbeddingConnectorConfig):
        raise CheckpointError(
            "NVLM_D holds models with connector.kind=embedding; NVIDIA published no folder of NVLM-X and NVLM-H, which "
            "use cross-attention: export without --to"
        )
    text = decoder.to_keys(ModelConfig(decoder=config.decoder))
    theta = text["rope_parameters"].get("rope_theta")
    projector = config.connector.projector
    if not isinstance(projector, MlpProjectorConfig) or projector.hidden_dim != text["intermediate_size"]:
        raise CheckpointError("NVLM_D holds MLP projectors whose hidden_dim is that of the decoder's feed-forward")
    return {
        "auto_map": {
            "AutoConfig": "configuration_nvlm_d.NVLM_D_Config",
            "AutoModel": "modeling_nvlm_d.NVLM_D_Model",
            "AutoModelForCausalLM": "modeling_nvlm_d.NVLM_D_Model",
        },
        # The published code is written for version 4 of transformers, which reads these keys.
        "llm_config": {**text, "architectures": _QWEN2, "model_type": "qwen2", "rope_theta": theta},
        "vision_config": {**intern_vit_6b.to_keys(config.vision), "model_type": "intern_vit_6b"},
        "force_image_size": vit.image_size(config.vision),
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "template": "chatml",
        **pixels.to_keys(config.vision),
    }


def _images(source: ImageSource) -> ImageInput:
    layout = {
        "start": "<Image>",
        "end": "</Image>",
        "spell": True,
        "tile": "<tile_{n}>",
        "overview": "<tile_global_thumbnail>",
    }
    return ImageInput(
        {"kind": "tiles", "tiling": {"kind": "internvl", "max_tiles": 6}, "layout": layout},
        tokens=("<|vision_pad|>", "<|image_pad|>"),
    )


LAYOUT = FamilyLayout("NVLM_D", "NVLM_D", _rules, _to_model, _to_keys, auto_class=None, images=_images)
