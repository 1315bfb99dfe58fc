"""Persimmon 8B: squared ReLU, biases, QK norms per head, RoPE on half of each head.

Queries, keys and values share one tensor, interleaved head by head.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import decoder
from mmscale.models.config import ModelConfig
from mmscale.nn.block import DenseMlpConfig, QkNorm
from mmscale.nn.rope import RopeConfig

_LAYER = "decoder.layers.{n}."
_THEIRS = "model.layers.{n}."


def name_rules(config: ModelConfig) -> NameRules:
    """Return the name rules of the decoder and the head."""
    attention = config.decoder.attention
    heads = attention.resolved_head_dim(config.decoder.hidden_dim)
    return (
        *(
            NameRule(
                f"{_LAYER}self_attn.{name}_proj.", f"{_THEIRS}self_attn.query_key_value.", block=heads, part=number
            )
            for number, name in enumerate("qkv")
        ),
        *renames(
            (f"{_LAYER}self_attn.o_proj.", f"{_THEIRS}self_attn.dense."),
            (f"{_LAYER}self_attn.q_norm.", f"{_THEIRS}self_attn.q_layernorm."),
            (f"{_LAYER}self_attn.k_norm.", f"{_THEIRS}self_attn.k_layernorm."),
            (f"{_LAYER}mlp.up_proj.", f"{_THEIRS}mlp.dense_h_to_4h."),
            (f"{_LAYER}mlp.down_proj.", f"{_THEIRS}mlp.dense_4h_to_h."),
            ("decoder.norm.", "model.final_layernorm."),
            ("decoder.embed_tokens.extra_weight", "model.embed_tokens.weight"),
            ("head.extra_weight", "lm_head.weight"),
            ("decoder.", "model."),
            ("head.", "lm_head."),
        ),
    )


def to_decoder(keys: Keys) -> dict[str, Any]:
    """Return ``decoder``.

    Raises:
        CheckpointError: a key is missing or needs a computation that our models lack.
    """
    keys.must_be("hidden_act", "relu2")
    keys.must_be("hidden_dropout", 0.0)
    keys.must_be("attention_dropout", 0.0)
    norms = keys.read("qk_layernorm", bool)
    return {
        "vocab_size": keys.read("vocab_size", int),
        "hidden_dim": keys.read("hidden_size", int),
        "num_layers": keys.read("num_hidden_layers", int),
        "attention": {
            "num_heads": keys.read("num_attention_heads", int),
            "qkv_bias": True,
            "out_bias": True,
            "qk_norm": "head" if norms else "none",
        },
        "mlp": {
            "kind": "dense",
            "hidden_dim": keys.read("intermediate_size", int),
            "activation": "relu_squared",
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": keys.read("layer_norm_eps", float)},
        "rope": decoder.to_rope(keys, partial=True),
        "tie_embeddings": keys.read("tie_word_embeddings", bool),
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of the decoder.

    Raises:
        CheckpointError: the decoder has experts.
    """
    block = config.decoder
    if not isinstance(block.mlp, DenseMlpConfig):
        raise CheckpointError("persimmon cannot express experts")
    rope = block.rope or RopeConfig()
    return {
        "vocab_size": block.num_ids,
        "hidden_size": block.hidden_dim,
        "intermediate_size": block.mlp.hidden_dim,
        "num_hidden_layers": block.num_layers,
        "num_attention_heads": block.attention.num_heads,
        "hidden_act": "relu2",
        "qk_layernorm": block.attention.qk_norm is QkNorm.HEAD,
        "layer_norm_eps": block.norm.eps,
        "rope_parameters": {**decoder.rope_keys(rope), "partial_rotary_factor": rope.fraction},
        "tie_word_embeddings": block.tie_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _to_model(keys: Keys) -> ModelConfig:
    return ModelConfig.model_validate({"decoder": to_decoder(keys)})


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    if config.vision is not None:
        raise CheckpointError("text decoders cannot express a vision tower")
    return to_keys(config)


LAYOUT = FamilyLayout("persimmon", "PersimmonForCausalLM", name_rules, _to_model, _to_keys)
