"""Shipped configurations of published models compared with the configurations and names of their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.config import load
from mmscale.hf.layout import forward_config
from mmscale.hf.layouts import layout_of
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.build import build_model
from mmscale.models.config import ModelConfig

FAMILIES = {
    "llama3.2-1b": "llama",
    "llama3.2-3b": "llama",
    "qwen2-7b": "qwen2",
    "qwen2-72b": "qwen2",
    "olmo-7b-1024": "olmo2",
    "mistral-nemo-12b": "mistral",
    "olmoe-1b-7b": "olmoe",
    "mixtral-8x7b": "mixtral",
    "qwen3-8b": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
    "fuyu-8b": "fuyu",
    "qwen2-vl-2b": "qwen2_vl",
    "qwen2-vl-7b": "qwen2_vl",
    "qwen2-vl-72b": "qwen2_vl",
    "pixtral-12b": "llava",
}
COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
QWEN3 = {
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED: dict[str, dict[str, Any]] = {  # In the format of version 4 of transformers.
    "fuyu-8b": {  # By memory.
        "architectures": ["FuyuForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_act": "relu2",
        "hidden_dropout": 0.0,
        "hidden_size": 4096,
        "image_size": 300,
        "initializer_range": 0.02,
        "intermediate_size": 16384,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 16384,
        "model_type": "fuyu",
        "num_attention_heads": 64,
        "num_channels": 3,
        "num_hidden_layers": 36,
        "patch_size": 30,
        "qk_layernorm": True,
        "rope_scaling": None,
        "rope_theta": 25000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262144,
    },
    "llama3.2-1b": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vocab_size": 128256,
    },
    "qwen2-7b": {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "olmoe-1b-7b": {  # By memory.
        **COMMON,
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 50304,
    },
    "mixtral-8x7b": {  # By memory.
        **COMMON,
        "architectures": ["MixtralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "qwen3-8b": {  # By memory.
        **COMMON,
        **QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {  # By memory.
        **COMMON,
        **QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "qwen2-vl-7b": {  # By memory.
        **COMMON,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    },
    "pixtral-12b": {  # By memory.
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 1,
        "image_token_index": 10,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {  # Missing keys have their class defaults.
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "is_composition": True,
            "max_position_embeddings": 1024000,
            "model_type": "mistral",
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vision_config": {
            "head_dim": 64,
            "hidden_act": "silu",
            "image_size": 1024,
            "is_composition": True,
            "model_type": "pixtral",
            "patch_size": 16,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


def shipped(name: str) -> ModelConfig:
    return load(Path(__file__).resolve().parents[2] / "configs" / "models" / f"{name}.yaml", [], ModelConfig).value


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_is_the_shipped_one(name: str) -> None:
    imported = layout_of(FAMILIES[name]).model_config(PUBLISHED[name], "config.json")
    assert forward_config(imported) == forward_config(shipped(name))


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_are_those_of_the_reference(name: str) -> None:
    """At full size on the meta device: our tensors and those of the published files correspond one to one."""
    import transformers

    layout, config = layout_of(FAMILIES[name]), shipped(name)
    values = layout.config_values(config)
    values.pop(PREPROCESSOR, None)
    assert layout.auto_class is not None
    with torch.device("meta"):
        auto = getattr(transformers, layout.auto_class)
        theirs = auto.from_config(transformers.AutoConfig.for_model(**values))
        ours = build_model(config, attention="sdpa")
    # Convert names in memory to names in files. In memory, the experts of a layer are stacked.
    expected = {layout.current_name(key): tuple(values.shape) for key, values in theirs.named_parameters()}
    shapes = {key: values.shape for key, values in ours.named_parameters()}
    stored = layout.hf_tensors(config, shapes, stacked=layout.stacked is not None)
    assert {key: tensor.shape for key, tensor in stored.items()} == expected
