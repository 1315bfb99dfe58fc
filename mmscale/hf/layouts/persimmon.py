"""Persimmon 8B: squared ReLU, biases everywhere, a norm over each head's queries and keys, half of a head rotated.

Its queries, keys and values are one tensor, dealt head by head.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout, Row, Rows, rows
from mmscale.models.config import ModelConfig
from mmscale.nn.attention import QkNorm
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.rope import RopeConfig

_LAYER = "decoder.layers.{n}."
_THEIRS = "model.layers.{n}."


def table(config: ModelConfig) -> Rows:
    """Where the decoder's parameters lie."""
    attention = config.decoder.attention
    heads = attention.resolved_head_dim(config.decoder.hidden_dim)
    return (
        *(
            Row(f"{_LAYER}self_attn.{name}_proj.", f"{_THEIRS}self_attn.query_key_value.", block=heads, part=number)
            for number, name in enumerate("qkv")
        ),
        *rows(
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
    """The ``decoder`` block.

    Raises:
        CheckpointError: a key is missing, or asks for what our models do not compute.
    """
    keys.must_be("hidden_act", "relu2")
    keys.must_be("hidden_dropout", 0.0)
    keys.must_be("attention_dropout", 0.0)
    norms = keys.take("qk_layernorm", bool, True)
    return {
        "vocab_size": keys.take("vocab_size", int),
        "hidden_dim": keys.take("hidden_size", int),
        "num_layers": keys.take("num_hidden_layers", int),
        "attention": {
            "num_heads": keys.take("num_attention_heads", int),
            "qkv_bias": True,
            "out_bias": True,
            "qk_norm": "head" if norms else "none",
        },
        "mlp": {
            "kind": "dense",
            "hidden_dim": keys.take("intermediate_size", int),
            "activation": "relu_squared",
            "gated": False,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": keys.take("layer_norm_eps", float)},
        "rope": _rope(keys),
        "tie_embeddings": keys.take("tie_word_embeddings", bool, False),
    }


def _rope(keys: Keys) -> dict[str, Any]:
    """Both forms; theta must be said, since versions of transformers differ in its default."""
    keys.must_be("rope_scaling", None)
    theta, fraction = keys.take("rope_theta", float, None), keys.take("partial_rotary_factor", float, 0.5)
    if (block := keys.block("rope_parameters")) is not None:
        block.must_be("rope_type", "default")
        theta = block.take("rope_theta", float, theta)
        fraction = block.take("partial_rotary_factor", float, fraction)
        block.finish()
    if theta is None:
        raise CheckpointError(f"{keys.where}: rope_theta is missing; the published weights were trained with 25000")
    return {"theta": theta, "fraction": fraction}


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """Their keys of the decoder.

    Raises:
        CheckpointError: it has experts.
    """
    decoder = config.decoder
    if not isinstance(decoder.mlp, DenseMlpConfig):
        raise CheckpointError("persimmon has no words for experts")
    rope = decoder.rope or RopeConfig()
    return {
        "vocab_size": decoder.num_ids,
        "hidden_size": decoder.hidden_dim,
        "intermediate_size": decoder.mlp.hidden_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.attention.num_heads,
        "hidden_act": "relu2",
        "qk_layernorm": decoder.attention.qk_norm is QkNorm.HEAD,
        "layer_norm_eps": decoder.norm.eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.theta,
            "partial_rotary_factor": rope.fraction,
        },
        "tie_word_embeddings": decoder.tie_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _to_model(keys: Keys) -> ModelConfig:
    return ModelConfig.model_validate({"decoder": to_decoder(keys)})


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    if config.vision is not None:
        raise CheckpointError("text decoders have no words for a vision tower")
    return to_keys(config)


LAYOUT = Layout("persimmon", "PersimmonForCausalLM", table, _to_model, _to_keys)
