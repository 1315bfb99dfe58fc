"""What the text decoders have in common: the keys of Llama's configuration, which its successors kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from mmscale.errors import CheckpointError
from mmscale.hf.keys import REQUIRED, Keys
from mmscale.hf.layout import rows
from mmscale.models.config import ModelConfig
from mmscale.nn.block import DenseMlpConfig
from mmscale.nn.rope import RopeConfig

ROWS = rows(
    ("decoder.embed_tokens.extra_weight", "model.embed_tokens.weight"),
    ("head.extra_weight", "lm_head.weight"),
    ("decoder.", "model."),
    ("head.", "lm_head."),
)
"""Module names that all of them share with ours."""
_ROPE_BLOCKS = ("rope_parameters", "rope_scaling")
"""Of version 5, and before it."""
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
        "rope": to_rope(keys, sectioned=sectioned),
        "tie_embeddings": keys.take("tie_word_embeddings", bool, False),
        **more,
    }
    return ModelConfig.model_validate({"decoder": decoder})


def to_rope(keys: Keys, *, sectioned: bool = False, partial: bool = False) -> dict[str, Any]:
    """``decoder.rope`` of either form: ``rope_parameters`` of version 5; ``rope_theta`` and ``rope_scaling`` before it.

    Args:
        keys: Theirs.
        sectioned: Whether positions have three axes, among which ``mrope_section`` divides the frequencies.
        partial: Whether the family can rotate a part of each head.

    Raises:
        CheckpointError: the base is missing, or the rotations are of a kind that our models do not compute.
    """
    theta = keys.take("rope_theta", float, None)
    new, old = _ROPE_BLOCKS
    block = keys.block(new) or keys.block(old) or Keys({}, keys.where)
    theta = block.take("rope_theta", float, theta)
    if theta is None:
        raise CheckpointError(
            f"{keys.where}: rope_theta is missing or null, and has no default that every version of transformers "
            "shares; state it (Persimmon and Fuyu were trained with 25000)"
        )
    kind = block.take("rope_type", str, block.take("type", str, "default"))
    rope: dict[str, Any] = {"theta": theta}
    if partial:
        rope["fraction"] = block.take("partial_rotary_factor", float, keys.take("partial_rotary_factor", float))
    else:
        block.must_be("partial_rotary_factor", 1.0)
    if sectioned:
        rope["sections"] = block.take("mrope_section", list)
        kind = "default" if kind == "mrope" else kind  # The name before version 5.
    rope["scaling"] = _scaling(kind, block, keys)
    block.finish()
    return rope


def _scaling(kind: str, block: Keys, keys: Keys) -> dict[str, Any] | None:
    """``rope.scaling``; a missing original context is the whole context, as in transformers."""
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": kind, "factor": block.take("factor", float)}
    if kind not in ("llama3", "yarn"):
        raise CheckpointError(
            f"{block.where}: rope_type={kind!r} is not supported, only 'default', 'linear', 'llama3' and 'yarn'"
        )
    context = keys.take("max_position_embeddings", int, None)
    original = block.take("original_max_position_embeddings", int, REQUIRED if context is None else context)
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return {"kind": kind, **{name: block.take(name, float) for name in names}, "original_context": original}
    ratio = REQUIRED if context is None or original < 1 else context / original
    factor = block.take("factor", float, ratio)
    return {
        "kind": kind,
        "factor": factor,
        "original_context": original,
        "attention_factor": block.take("attention_factor", float, _mscale(block, factor)),
        "beta_fast": block.take("beta_fast", float, None) or 32.0,
        "beta_slow": block.take("beta_slow", float, None) or 1.0,
        "truncate": block.take("truncate", bool, True),
    }


def _mscale(block: Keys, factor: float) -> float | None:
    """Factor of cosines and sines in DeepSeek's words; None unless both are there."""
    above, below = block.take("mscale", float, None), block.take("mscale_all_dim", float, None)
    if not above or not below:
        return None
    stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (above * stretch + 1) / (below * stretch + 1)


def check_repeats(keys: Keys, text: Keys, read: Callable[[Keys], object]) -> None:
    """Require that decoder keys beside ``text_config`` say what that block says.

    Some versions of transformers write these keys twice. Its models are built from the block.

    Args:
        keys: Of the model; those that it has read itself are not compared.
        text: Of the block, already read.
        read: Our configuration of a decoder's keys.

    Raises:
        CheckpointError: a key beside the block changes the configuration.
    """
    values: Mapping[str, Any] = text.values
    within = read(Keys(values, text.where))
    for key in sorted(((text.read | {*_ROPE_BLOCKS}) & keys.given.keys()) - keys.read):
        keys.read.add(key)
        values = _with(values, key, keys.given[key])
        try:
            same = read(Keys(values, keys.where)) == within
        except (CheckpointError, ValidationError):
            same = False
        if not same:
            raise CheckpointError(
                f"{keys.said(key)} contradicts text_config, which says {text.values.get(key)!r}; transformers builds "
                f"the model from text_config, so remove {key} beside it if that is right"
            )


def _with(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """``values`` with another one of a key; the base of the rotations may be at two places."""
    found = dict(values)
    if key == "rope_theta" or key in _ROPE_BLOCKS:
        for name in _ROPE_BLOCKS:
            if isinstance(block := found.get(name), Mapping):
                theta = block.get("rope_theta")
                found["rope_theta"] = found.get("rope_theta") if theta is None else theta
                found[name] = {k: v for k, v in block.items() if k != "rope_theta"} if key == "rope_theta" else None
    found[key] = value
    return found


def check_window(keys: Keys, slides: bool = True) -> None:
    """Require that no window of attention hides a token within the context.

    Args:
        keys: Theirs.
        slides: Whether a block has the window.

    Raises:
        CheckpointError: it does, and the window is shorter than the context.
    """
    window, context = keys.take("sliding_window", int, None), keys.take("max_position_embeddings", int, None)
    if slides and window is not None and (context is None or window < context):
        raise CheckpointError(
            f"{keys.said('sliding_window')} is shorter than max_position_embeddings={context}; attention over a window "
            "is not supported, only null or a window as long as the context"
        )


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
        "rope_parameters": rope_keys(decoder.rope or RopeConfig()),
        "tie_word_embeddings": decoder.tie_embeddings,
        "attention_dropout": 0.0,
        # Left out they would be those of the family's first model.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """``rope_parameters``, the fraction of a head apart."""
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.sections is not None:
        values["mrope_section"] = list(rope.sections)
    if rope.scaling is not None:
        scaling = rope.scaling.model_dump(exclude_none=True)
        values["rope_type"] = scaling.pop("kind")
        if "original_context" in scaling:
            values["original_max_position_embeddings"] = scaling.pop("original_context")
        values |= scaling
    return values
