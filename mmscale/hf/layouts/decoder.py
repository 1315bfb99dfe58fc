"""What the text decoders have in common: the keys of Llama's configuration, which its successors kept."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import rows
from mmscale.models.config import ModelConfig
from mmscale.nn.mlp import DenseMlpConfig
from mmscale.nn.rope import RopeConfig

ROWS = rows(
    ("decoder.embed_tokens.extra_weight", "model.embed_tokens.weight"),
    ("head.extra_weight", "lm_head.weight"),
    ("decoder.", "model."),
    ("head.", "lm_head."),
)
"""Module names that all of them share with ours."""
UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Frequencies, which follow from the configuration; files of 2023 hold them."""


def to_model(
    keys: Keys,
    *,
    attention: dict[str, Any] | None = None,
    mlp_bias: bool = False,
    sectioned: bool = False,
    **more: Any,
) -> ModelConfig:
    """A text model.

    Args:
        keys: Theirs.
        attention: Of ``decoder.attention`` what the family decides.
        mlp_bias: Biases in the feed-forward.
        sectioned: Whether positions have three axes, among which ``mrope_section`` divides the frequencies.
        **more: Of ``decoder`` what the family decides.

    Raises:
        CheckpointError: a key is missing, or asks for what our models do not compute.
    """
    keys.must_be("hidden_act", "silu")
    keys.must_be("attention_dropout", 0.0)
    heads, width = keys.take("num_attention_heads", int), keys.take("hidden_size", int)
    head_dim = keys.take("head_dim", int, None)
    if "num_key_value_heads" not in keys.values:
        keys.take("num_key_value_heads", int)  # Its default differs between families and versions.
    decoder = {
        "vocab_size": keys.take("vocab_size", int),
        "hidden_dim": width,
        "num_layers": keys.take("num_hidden_layers", int),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": keys.take("num_key_value_heads", int, heads),
            "head_dim": None if head_dim is not None and head_dim * heads == width else head_dim,
            **(attention or {}),
        },
        "mlp": {"kind": "dense", "hidden_dim": keys.take("intermediate_size", int), "bias": mlp_bias},
        "norm": {"kind": "rmsnorm", "eps": keys.take("rms_norm_eps", float)},
        "rope": _rope(keys, sectioned),
        "tie_embeddings": keys.take("tie_word_embeddings", bool, False),
        **more,
    }
    return ModelConfig.model_validate({"decoder": decoder})


def _rope(keys: Keys, sectioned: bool) -> dict[str, Any]:
    """Both forms: ``rope_parameters`` of version 5; ``rope_theta`` and ``rope_scaling`` before it."""
    theta = keys.take("rope_theta", float, 10_000.0)
    block = keys.block("rope_parameters") or keys.block("rope_scaling") or Keys({}, keys.where)
    theta = block.take("rope_theta", float, theta)
    kind = block.take("rope_type", str, block.take("type", str, "default"))
    block.must_be("partial_rotary_factor", 1.0)
    scaling = sections = None
    if sectioned:
        sections = block.take("mrope_section", list)
        kind = "default" if kind == "mrope" else kind  # So called before version 5.
    if kind == "llama3":
        scaling = {name: block.take(name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_context"] = block.take("original_max_position_embeddings", int)
    elif kind != "default":
        raise CheckpointError(f"{block.where}: rope_type={kind!r} is not supported, only 'default' and 'llama3'")
    block.finish()
    return {"theta": theta, "scaling": scaling, "sections": sections}


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """Their keys of a text model.

    Raises:
        CheckpointError: it has a vision tower or experts.
    """
    decoder = config.decoder
    width, heads = decoder.hidden_dim, decoder.attention.num_heads
    head_dim = decoder.attention.resolved_head_dim(width)
    if config.vision is not None:
        raise CheckpointError("text decoders have no words for a vision tower")
    if not isinstance(decoder.mlp, DenseMlpConfig):
        raise CheckpointError("dense decoders have no words for experts")
    return {
        "vocab_size": decoder.num_ids,
        "hidden_size": width,
        "intermediate_size": decoder.mlp.hidden_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": decoder.attention.kv_heads,
        **({} if head_dim * heads == width else {"head_dim": head_dim}),  # Not a key of every family.
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "rope_parameters": _rope_keys(decoder.rope or RopeConfig()),
        "tie_word_embeddings": decoder.tie_embeddings,
        "attention_dropout": 0.0,
        # Left out they would be those of the family's first model.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _rope_keys(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling is None:
        sections = {} if rope.sections is None else {"mrope_section": list(rope.sections)}
        return {"rope_type": "default", "rope_theta": rope.theta, **sections}
    scaling = rope.scaling.model_dump()
    original = scaling.pop("original_context")
    return {
        "rope_type": "llama3",
        "rope_theta": rope.theta,
        **scaling,
        "original_max_position_embeddings": original,
    }
