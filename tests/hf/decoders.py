"""Tiny random text decoders of transformers, one for each property in which families differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.reference_models import randomise

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "original_max_position_embeddings": 16,  # Shorter than the documents of the tests.
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
HALVES = {"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "rope_parameters": PLAIN}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, grouped, stretched": (
        "llama",
        {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": STRETCHED},
    ),
    "llama, biases everywhere": (
        "llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rope_parameters": PLAIN},
    ),
    "qwen2, one key head": ("qwen2", {"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_parameters": PLAIN}),
    "qwen2, tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "mistral, narrow heads": (
        "mistral",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": PLAIN,
        },
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_parameters": PLAIN}),
    "olmo2, grouped, biased": ("olmo2", {"num_key_value_heads": 2, "attention_bias": True, "rope_parameters": PLAIN}),
    "olmoe": ("olmoe", {**EXPERTS, "intermediate_size": 24}),
    "olmoe, renormalised, grouped, biased": (
        "olmoe",
        {**EXPERTS, "intermediate_size": 24, "norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 2},
    ),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4, "rope_parameters": PLAIN}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 24, "rope_parameters": PLAIN}),
    "qwen3, tied, biased": (
        "qwen3",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_parameters": PLAIN,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **EXPERTS,
            "moe_intermediate_size": 24,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe, every second block": (
        "qwen3_moe",
        {**EXPERTS, "moe_intermediate_size": 24, "num_key_value_heads": 4, "decoder_sparse_step": 2},
    ),
    "persimmon": ("persimmon", {"rope_parameters": HALVES}),
    "persimmon, no norms of heads": ("persimmon", {"qk_layernorm": False, "rope_parameters": HALVES}),
}


def reference_model(name: str, seed: int = 0, **sizes: Any) -> Any:
    """Return one of ``DECODERS`` with changed ``SIZES``. Norms are not 1 and biases not 0, to hide no error."""
    import transformers

    family, keys = DECODERS[name]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **keys, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    return model


def every_expert(name: str) -> dict[str, int]:
    """Return the changes to a model of ``DECODERS`` that let each token use all experts; none for a dense model."""
    keys = DECODERS[name][1]
    count = keys.get("num_experts", keys.get("num_local_experts"))
    return {} if count is None else {"num_experts_per_tok": count}


def saved_reference(name: str, folder: Path, **kwargs: Any) -> Any:
    """Return the model after transformers has saved it to ``folder``."""
    model = reference_model(name)
    model.save_pretrained(folder, **kwargs)
    return model
