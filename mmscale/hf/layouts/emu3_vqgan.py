"""Emu3's image tokenizer in the format of transformers' Emu3VQVAE."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import image_blocks
from mmscale.models.config import AnyModelConfig, TokenizerConfig
from mmscale.models.image_tokenizer import MovqganConfig

_SIZE = "codebook_size"


def _rules(config: AnyModelConfig) -> NameRules:
    levels = len(image_blocks.tokenizer(config).multipliers)
    found: list[NameRule] = []
    for side, down, coded in (("encoder", "down", False), ("decoder", "up", True)):
        for number in range(levels):
            level = number if side == "encoder" else levels - 1 - number  # They count from the finest level on.
            ours, theirs = f"image_tokenizer.{side}.levels.{number}", f"{side}.{down}_block.{down}.{level}"
            found += image_blocks.residual(f"{ours}.blocks.{{n}}", f"{theirs}.block.{{n}}", coded=coded)
            names = (f"{theirs}.attn.{{n}}", f"{theirs}.attn_norms.{{n}}")
            found += _attention(f"{ours}.attentions.{{n}}", *names, coded=coded)
            found += renames((f"{ours}.conv.", f"{theirs}.{down}sample.conv."))
        ours, theirs = f"image_tokenizer.{side}.middle", f"{side}.middle_block"
        found += image_blocks.residual(f"{ours}.before", f"{theirs}.block_1", coded=coded)
        found += image_blocks.residual(f"{ours}.after", f"{theirs}.block_2", coded=coded)
        found += _attention(f"{ours}.attention", f"{theirs}.attn_1", f"{theirs}.attn_norm", coded=coded)
        found += image_blocks.norm(f"image_tokenizer.{side}.norm_out", f"{side}.norm_out", coded=coded)
        frames = f"image_tokenizer.{side}_frames"
        found += renames(
            (f"{frames}.convs.{{n}}.", f"{side}.time_conv.{{n}}.conv."),
            (f"{frames}.blocks.{{n}}.", f"{side}.time_res_stack.{{n}}."),
        )
    return (*found, *renames(("image_tokenizer.codebook.", "quantize.embedding."), ("image_tokenizer.", "")))


def _attention(ours: str, theirs: str, their_norm: str, *, coded: bool) -> NameRules:
    return (
        *image_blocks.norm(f"{ours}.norm", their_norm, coded=coded),
        *renames((f"{ours}.o_proj.", f"{theirs}.out_proj."), (f"{ours}.", f"{theirs}.")),
    )


def _to_model(keys: Keys) -> TokenizerConfig:
    keys.must_be("attention_dropout", 0.0)
    keys.must_be("num_attention_heads", 1)
    multipliers, levels = keys.read("channel_multiplier", list), keys.read("attn_resolutions", list)
    width = keys.positive_int("base_channels") * multipliers[-1]
    keys.must_be("hidden_size", width)  # Channels of attention: those of the last level.
    more = {
        "kind": "movqgan",
        "attention_levels": levels,
        "temporal_factor": keys.read("temporal_downsample_factor", int),
    }
    return image_blocks.to_tokenizer(keys, _SIZE, **more)


def _to_keys(config: TokenizerConfig) -> dict[str, Any]:
    tokenizer = config.image_tokenizer
    if not isinstance(tokenizer, MovqganConfig):
        raise CheckpointError("emu3_vqgan holds image tokenizers of kind movqgan")
    last = tokenizer.multipliers[-1]
    if any(tokenizer.multipliers[level] != last for level in tokenizer.attention_levels):
        raise CheckpointError("emu3_vqgan holds attention in levels with the width of the last level")
    return {
        **image_blocks.to_keys(tokenizer, _SIZE),
        "attn_resolutions": list(tokenizer.attention_levels),
        "temporal_downsample_factor": tokenizer.temporal_factor,
        "hidden_size": tokenizer.base_dim * tokenizer.multipliers[-1],
        "num_attention_heads": 1,
        "attention_dropout": 0.0,
    }


LAYOUT = FamilyLayout(
    "emu3_vqgan",
    "Emu3VQVAE",
    _rules,
    _to_model,
    _to_keys,
    kind=TokenizerConfig,
    training_only=image_blocks.TRAINING_ONLY,
    auto_class="Emu3VQVAE",
    buffers=True,
)
