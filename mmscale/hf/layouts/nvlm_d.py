"""NVLM-D 72B as NVIDIA publishes it: InternViT, pixel shuffle and an MLP before Qwen2.

The published tower has 7 heads more than InternViT, without effect: they make the number of heads divisible by 8. They
are zeros in the file, which an import checks and leaves out, and an export writes again. transformers has no class of
this family; the code that reads such a folder lies in the published one, and in vLLM.

Source: keys, names and order of the pixel shuffle from the published configuration, index and ``modeling_nvlm_d.py``;
the place of the 7 heads, behind the others, from vLLM's ``intern_vit.py``.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout, Row, Rows, rows, under
from mmscale.hf.layouts import decoder, intern_vit_6b, pixels, vit
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, MlpProjectorConfig
from mmscale.models.vision_config import VisionConfig

_DUMMY_HEADS = 7
_QWEN2 = ["Qwen2ForCausalLM"]


def _rows(config: ModelConfig) -> Rows:
    assert isinstance(config.vision, VisionConfig)
    return (
        *under(_padded_rows(config.vision), theirs=("", "vision_model.")),
        *under(intern_vit_6b.fused_rows(config.vision), theirs=("", "vision_model.")),
        *rows(
            ("connector.projector.norm.", "mlp1.0."),
            ("connector.projector.fc1.", "mlp1.1."),
            ("connector.projector.fc2.", "mlp1.3."),
        ),
        *under(decoder.ROWS, theirs=("", "language_model.")),
    )


def _padded_rows(vision: VisionConfig) -> Rows:
    """Of what has a width of all heads, the dummy heads included."""
    width, attention = vision.hidden_dim, "vision.layers.{n}.self_attn."
    zeros = _DUMMY_HEADS * (width // vision.attention.num_heads)
    heads = width + zeros
    theirs = "encoder.layers.{n}.attn."
    fused = [
        row
        for part in "qkv"
        for row in (
            Row(f"{attention}{part}_proj.weight", f"{theirs}qkv.weight", (3 * heads, width), zeros=zeros * width),
            Row(f"{attention}{part}_proj.bias", f"{theirs}qkv.bias", (3 * heads,), zeros=zeros),
        )
    ]
    return (
        *fused,
        Row(f"{attention}o_proj.weight", f"{theirs}proj.weight", (width, heads), block=1, zeros=zeros),
        Row(f"{attention}q_norm.weight", f"{theirs}q_norm.weight", (heads,), zeros=zeros),
        Row(f"{attention}k_norm.weight", f"{theirs}k_norm.weight", (heads,), zeros=zeros),
    )


def _to_model(keys: Keys) -> ModelConfig:
    if keys.take("ps_version", str, "v1") != "v2":
        raise CheckpointError(f"{keys.where}: ps_version must be 'v2'; 'v1', the default, turns the image over")
    keys.must_be("select_layer", -1)
    keys.must_be("downsample_ratio", 0.5)
    for name in ("use_backbone_lora", "use_llm_lora"):
        keys.must_be(name, 0)
    # How images are cut, and turns worded: of the data.
    for name, kind in (("dynamic_image_size", bool), ("use_thumbnail", bool), ("template", str), ("auto_map", dict)):
        keys.take(name, kind, None)
    for name in ("min_dynamic_patch", "max_dynamic_patch"):
        keys.take(name, int, None)
    block = keys.needed("vision_config", "intern_vit_6b")
    vision = intern_vit_6b.to_vision(block)
    block.take("use_bfloat16", bool, None)
    block.finish()
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
    """``decoder``, of Qwen2's code whatever ``model_type`` says."""
    values = keys.take("llm_config", dict)
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "dynamic":
        # It stretches texts beyond max_position_embeddings alone; Qwen2's code of that time knows no scaling.
        values = {key: value for key, value in values.items() if key != "rope_scaling"}
    block = Keys(values, f"{keys.where}: llm_config", "qwen2")
    if (kind := block.take("architectures", list)) != _QWEN2:
        raise CheckpointError(f"{block.where}: architectures={kind!r} is not supported, only {_QWEN2!r}")
    block.must_be("attention_bias", True)
    block.must_be("mlp_bias", False)
    block.must_be("use_sliding_window", False)
    block.take("use_bfloat16", bool, None)
    text = decoder.to_model(block, attention={"qkv_bias": True})
    block.finish()
    return text.model_dump(mode="json")["decoder"]


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    if not isinstance(config.vision, VisionConfig) or not isinstance(config.connector, EmbeddingConnectorConfig):
        raise CheckpointError(
            "NVLM_D holds models whose image features take token places; of NVLM-X and NVLM-H, with cross-attention, "
            "no folder was published: export without --to"
        )
    text = decoder.to_keys(ModelConfig(decoder=config.decoder))
    theta = text["rope_parameters"].get("rope_theta")
    projector = config.connector.projector
    if not isinstance(projector, MlpProjectorConfig) or projector.hidden_dim != text["intermediate_size"]:
        raise CheckpointError("NVLM_D has an MLP projector as wide as the decoder's feed-forward")
    return {
        "auto_map": {
            "AutoConfig": "configuration_nvlm_d.NVLM_D_Config",
            "AutoModel": "modeling_nvlm_d.NVLM_D_Model",
            "AutoModelForCausalLM": "modeling_nvlm_d.NVLM_D_Model",
        },
        # Read by version 4 of transformers, for which that code is.
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


LAYOUT = Layout("NVLM_D", "NVLM_D", _rows, _to_model, _to_keys, auto_class=None)
