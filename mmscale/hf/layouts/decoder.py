"""Code shared by the text decoders: most families use the keys of Llama's configuration.

Published folders have three matrices for each expert. Our model, and version 5 of transformers in memory, stacks the
experts of a layer:

    mlp.experts.0.gate_proj.weight, mlp.experts.0.up_proj.weight, ...   <-->   mlp.experts.gate_up_proj  (E, 2 F, D)
    mlp.experts.0.down_proj.weight, ...                                 <-->   mlp.experts.down_proj     (E, D, F)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mmscale.errors import CheckpointError
from mmscale.hf.keys import REQUIRED, Keys
from mmscale.hf.layout import NameRule, NameRules, renames
from mmscale.models.config import ModelConfig
from mmscale.nn.block import DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.rope import RopeConfig

RULES = renames(
    ("decoder.embed_tokens.extra_weight", "model.embed_tokens.weight"),
    ("head.extra_weight", "lm_head.weight"),
    ("decoder.", "model."),
    ("head.", "lm_head."),
)
"""Name rules of the modules that all these decoders share."""


def expert_rules(theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> NameRules:
    """Return the name rules of experts that a folder stores one by one.

    Args:
        theirs: Prefix of their names, up to the number of the expert.
        gate: Name of their gate projection.
        up: Name of their up projection.
        down: Name of their down projection.
    """
    ours = "decoder.layers.{n}.mlp.experts."
    return (
        NameRule(f"{ours}gate_up_proj", theirs, slices=(f"{{e}}.{gate}.weight", f"{{e}}.{up}.weight")),
        NameRule(f"{ours}down_proj", theirs, slices=(f"{{e}}.{down}.weight",)),
    )


EXPERTS = expert_rules("model.layers.{n}.mlp.experts.")
"""Name rules of experts in most families."""
_ROPE_BLOCKS = ("rope_parameters", "rope_scaling")
"""Key of the RoPE parameters in version 5 of transformers, and in older versions."""
UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""RoPE frequencies in files from 2023. They follow from the configuration."""


@dataclass(frozen=True)
class ExpertKeys:
    """The keys of a family that describe its experts.

    Attributes:
        num_experts: Key of E.
        expert_dim: Key of F.
        fixed: Fields of ``MoeConfig`` that the family fixes.
    """

    num_experts: str
    expert_dim: str
    fixed: Mapping[str, Any]

    def to_model(self, keys: Keys, num_experts: int | None = None, **more: Any) -> dict[str, Any]:
        """Return ``decoder.mlp``.

        ``router_aux_loss_coef`` becomes the weight of our balance loss, which is 1 at perfect balance, as in the
        published training codes (megablocks, Megatron-LM). The loss that transformers adds with
        ``output_router_logits`` is the number of experts per token at perfect balance, so its weight is larger.

        Args:
            keys: Keys of the decoder.
            num_experts: E; None to read its key.
            **more: Further fields of ``MoeConfig``.
        """
        keys.read("output_router_logits", bool, False)  # Changes the loss that transformers returns, not the logits.
        return {
            "kind": "moe",
            "num_experts": keys.read(self.num_experts, int) if num_experts is None else num_experts,
            "experts_per_token": keys.read("num_experts_per_tok", int),
            "expert_dim": keys.read(self.expert_dim, int),
            "balance_coefficient": keys.read("router_aux_loss_coef", float),
            **self.fixed,
            **more,
        }

    def to_keys(self, mlp: MoeConfig) -> dict[str, Any]:
        """Return the keys of the experts. The caller adds those of the family's other ``MoeConfig`` fields."""
        return {
            self.num_experts: mlp.num_experts,
            "num_experts_per_tok": mlp.experts_per_token,
            self.expert_dim: mlp.expert_dim,
            "router_aux_loss_coef": mlp.balance_coefficient,
            "output_router_logits": False,
        }


def experts_of(config: ModelConfig, family: str) -> MoeConfig:
    """Return the experts of a model.

    Raises:
        CheckpointError: the model has none.
    """
    if not isinstance(config.decoder.mlp, MoeConfig):
        raise CheckpointError(f"{family} holds decoders with experts (decoder.mlp.kind=moe)")
    return config.decoder.mlp


def to_model(
    keys: Keys,
    *,
    attention: dict[str, Any] | None = None,
    mlp_bias: bool = False,
    sectioned: bool = False,
    drops: bool = False,
    **more: Any,
) -> ModelConfig:
    """Return the config of a text model.

    Args:
        keys: Keys of the decoder.
        attention: Fields of ``decoder.attention`` that the family fixes.
        mlp_bias: Whether the feed-forward layers have biases.
        sectioned: Whether positions have three axes; ``mrope_section`` divides the frequencies among them.
        drops: Whether ``attention_dropout`` may differ from 0; the family then reads the rate itself.
        **more: Fields of ``decoder`` that the family fixes, ``mlp`` among them if it has experts.

    Raises:
        CheckpointError: a key is missing or needs a computation that our models lack.
    """
    keys.must_be("hidden_act", "silu")
    if not drops:
        keys.must_be("attention_dropout", 0.0)
    heads, width = keys.read("num_attention_heads", int), keys.read("hidden_size", int)
    head_dim = keys.read("head_dim", int, None)
    decoder = {
        "vocab_size": keys.read("vocab_size", int),
        "hidden_dim": width,
        "num_layers": keys.read("num_hidden_layers", int),
        "attention": {
            "num_heads": heads,
            "num_kv_heads": keys.read("num_key_value_heads", int, heads),
            "head_dim": None if head_dim is not None and head_dim * heads == width else head_dim,
            **(attention or {}),
        },
        "mlp": {"kind": "dense", "hidden_dim": keys.read("intermediate_size", int), "bias": mlp_bias},
        "norm": {"kind": "rmsnorm", "eps": keys.read("rms_norm_eps", float)},
        "rope": to_rope(keys, sectioned=sectioned),
        "tie_embeddings": keys.read("tie_word_embeddings", bool, False),
        **more,
    }
    return ModelConfig.model_validate({"decoder": decoder})


def to_rope(keys: Keys, *, sectioned: bool = False, partial: bool = False) -> dict[str, Any]:
    """Return ``decoder.rope``.

    Version 5 of transformers writes ``rope_parameters``; older versions write ``rope_theta`` and ``rope_scaling``.

    Args:
        keys: Keys of the decoder.
        sectioned: Whether positions have three axes; ``mrope_section`` divides the frequencies among them.
        partial: Whether the family can rotate a fraction of each head.

    Raises:
        CheckpointError: the base is missing, or our models lack this kind of RoPE.
    """
    theta = keys.read("rope_theta", float, None)
    new, old = _ROPE_BLOCKS
    block = keys.optional_object(new) or keys.optional_object(old) or Keys({}, keys.where)
    theta = block.read("rope_theta", float, theta)
    if theta is None:
        raise CheckpointError(
            f"{keys.where}: rope_theta is missing or null, and has no default that every version of transformers "
            "shares; state it (Persimmon and Fuyu were trained with 25000)"
        )
    kind = block.read("rope_type", str, block.read("type", str, "default"))
    rope: dict[str, Any] = {"theta": theta}
    if partial:
        rope["fraction"] = block.read("partial_rotary_factor", float, keys.read("partial_rotary_factor", float))
    else:
        block.must_be("partial_rotary_factor", 1.0)
    if sectioned:
        rope["sections"] = block.read("mrope_section", list)
        kind = "default" if kind == "mrope" else kind  # "mrope" is the name before version 5.
    rope["scaling"] = _scaling(kind, block, keys)
    block.raise_on_unread()
    return rope


def _scaling(kind: str, block: Keys, keys: Keys) -> dict[str, Any] | None:
    """Return ``rope.scaling``. A missing original context is the whole context, as in transformers."""
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": kind, "factor": block.read("factor", float)}
    if kind not in ("llama3", "yarn"):
        raise CheckpointError(
            f"{block.where}: rope_type={kind!r} is not supported, only 'default', 'linear', 'llama3' and 'yarn'"
        )
    context = keys.read("max_position_embeddings", int, None)
    original = block.read("original_max_position_embeddings", int, REQUIRED if context is None else context)
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return {"kind": kind, **{name: block.read(name, float) for name in names}, "original_context": original}
    ratio = REQUIRED if context is None or original < 1 else context / original
    factor = block.read("factor", float, ratio)
    return {
        "kind": kind,
        "factor": factor,
        "original_context": original,
        "attention_factor": block.read("attention_factor", float, _attention_factor(block, factor)),
        "beta_fast": block.read("beta_fast", float, None) or 32.0,
        "beta_slow": block.read("beta_slow", float, None) or 1.0,
        "truncate": block.read("truncate", bool, True),
    }


def _attention_factor(block: Keys, factor: float) -> float | None:
    """Return the factor of cosines and sines from DeepSeek's keys; None if one of them is missing or 0."""
    mscale, all_dim = block.read("mscale", float, None), block.read("mscale_all_dim", float, None)
    if not mscale or not all_dim:
        return None
    log_factor = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (mscale * log_factor + 1) / (all_dim * log_factor + 1)


def check_repeats(keys: Keys, text: Keys, read: Callable[[Keys], object]) -> None:
    """Require that top-level decoder keys agree with ``text_config``.

    Some versions of transformers write these keys in both places and build the model from ``text_config``. The compared
    top-level keys are marked as read.

    Args:
        keys: Top-level keys; those that were already read are not compared.
        text: Keys of ``text_config``, already read.
        read: Converts a decoder's keys to our config.

    Raises:
        CheckpointError: a top-level key would change the config.
    """
    values: Mapping[str, Any] = text.values
    expected = read(Keys(values, text.where))
    for key in sorted(((text.read_keys | {*_ROPE_BLOCKS}) & keys.given.keys()) - keys.read_keys):
        keys.read_keys.add(key)
        values = _with_key(values, key, keys.given[key])
        try:
            same = read(Keys(values, keys.where)) == expected
        except (CheckpointError, ValidationError):
            same = False
        if not same:
            raise CheckpointError(
                f"{keys.describe(key)} contradicts text_config, which has {text.values.get(key)!r}; transformers "
                f"builds the model from text_config, so remove the top-level {key} if text_config is right"
            )


def _with_key(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return ``values`` with one key replaced. The RoPE base may be set in two places; the new key overrides both."""
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
    """Require that a sliding window covers the whole context.

    Args:
        keys: Keys of the decoder.
        slides: Whether any block uses the window.

    Raises:
        CheckpointError: a block uses the window, and it is shorter than the context.
    """
    window, context = keys.read("sliding_window", int, None), keys.read("max_position_embeddings", int, None)
    if slides and window is not None and (context is None or window < context):
        raise CheckpointError(
            f"{keys.describe('sliding_window')} is shorter than max_position_embeddings={context}; a sliding window "
            "is not supported, only null or a window as long as the context"
        )


def to_keys(config: ModelConfig, experts: ExpertKeys | None = None) -> dict[str, Any]:
    """Return the keys of a text model.

    Args:
        config: Config of the model.
        experts: The family's keys of experts; None for a dense family.

    Raises:
        CheckpointError: the model has a vision tower, or it has experts and the family none.
    """
    decoder = config.decoder
    width, heads = decoder.hidden_dim, decoder.attention.num_heads
    head_dim = decoder.attention.resolved_head_dim(width)
    if config.vision is not None:
        raise CheckpointError("text decoders cannot express a vision tower")
    mlp, expert_keys = decoder.mlp, dict[str, Any]()
    if isinstance(mlp, MoeConfig):
        if experts is None:
            raise CheckpointError("dense decoders cannot express experts")
        expert_keys = experts.to_keys(mlp)
        mlp = mlp.dense or DenseMlpConfig(hidden_dim=mlp.expert_dim)
    return {
        "vocab_size": decoder.num_ids,
        "hidden_size": width,
        "intermediate_size": mlp.hidden_dim,
        **expert_keys,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": decoder.attention.kv_heads,
        **({} if head_dim * heads == width else {"head_dim": head_dim}),  # Some families lack this key.
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "rope_parameters": rope_keys(decoder.rope or RopeConfig()),
        "tie_word_embeddings": decoder.tie_embeddings,
        "attention_dropout": 0.0,
        # Without these keys transformers takes the ids of the family's first model.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def rope_keys(rope: RopeConfig) -> dict[str, Any]:
    """Return ``rope_parameters`` without ``partial_rotary_factor``."""
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
