"""Janus' image tokenizer (LlamaGen's VQ-16) in the format of transformers' JanusVQVAE.

JanusVQVAE scales codes to length 1 when it decodes, and neither codes nor latents when it encodes; the code that Janus
was trained with scales both. An import has ``normalized_codes: decoding`` and computes what transformers computes. Set
``always`` to get the tokens of the original code from the same weights.

A tokenizer that was trained with ``always`` is exported with codes of length 1. The nearest of such codes does not
depend on the length of the latent, so JanusVQVAE finds the same tokens.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import image_blocks
from mmscale.models.config import AnyModelConfig, TokenizerConfig
from mmscale.models.image_tokenizer import VqganConfig

_SIZE = "num_embeddings"
_NUM_PATCHES = 32
"""Default of transformers for the tokens of a side."""
_PROJECTIONS = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "proj_out"))


def _rules(config: AnyModelConfig) -> NameRules:
    tokenizer = image_blocks.tokenizer(config)
    scaled = isinstance(tokenizer, VqganConfig) and tokenizer.normalized_codes == "always"
    width = tokenizer.base_dim * tokenizer.multipliers[-1]  # Attention is in the last level only.
    levels = len(tokenizer.multipliers)
    found: list[NameRule] = []
    for side, name, count in (("encoder", "down", levels), ("decoder", "up", levels)):
        for level in range(count):
            ours, theirs = f"image_tokenizer.{side}.levels.{level}", f"{side}.{name}.{level}"
            found += image_blocks.residual(f"{ours}.blocks.{{n}}", f"{theirs}.block.{{n}}")
            found += _attention(f"{ours}.attentions.{{n}}", f"{theirs}.attn.{{n}}", width)
            resize = "downsample" if side == "encoder" else "upsample"
            found += renames((f"{ours}.conv.", f"{theirs}.{resize}.conv."))
        ours, theirs = f"image_tokenizer.{side}.middle", f"{side}.mid"
        found += image_blocks.residual(f"{ours}.before", f"{theirs}.block_1")
        found += image_blocks.residual(f"{ours}.after", f"{theirs}.block_2")
        found += _attention(f"{ours}.attention", f"{theirs}.attn_1", width)
    codes = NameRule("image_tokenizer.codebook.", "quantize.embedding.", unit_rows=scaled)
    return (*found, codes, *renames(("image_tokenizer.", "")))


def _attention(ours: str, theirs: str, width: int) -> NameRules:
    """Return the rules of attention, whose projections are convolutions of 1 x 1 in their format."""
    weights = tuple(
        NameRule(f"{ours}.{mine}.weight", f"{theirs}.{other}.weight", (-1, width, 1, 1)) for mine, other in _PROJECTIONS
    )
    biases = renames(*((f"{ours}.{mine}.", f"{theirs}.{other}.") for mine, other in _PROJECTIONS))
    return (*weights, *biases, *renames((f"{ours}.norm.", f"{theirs}.norm.")))


def _to_model(keys: Keys) -> TokenizerConfig:
    keys.must_be("dropout", 0.0)
    # Keys of the layers that embed and predict tokens, which belong to the model around the tokenizer.
    for key, kind in (("projection_dim", int), ("num_hidden_layers", int), ("hidden_act", str)):
        keys.read(key, kind, None)
    keys.read("image_token_embed_dim", int, None)
    keys.read("beta", float, None)  # Weight of a loss.
    levels = len(keys.read("channel_multiplier", list))
    more = {"kind": "vqgan", "normalized_codes": "decoding", "attention_levels": [levels - 1]}
    tokenizer = image_blocks.to_tokenizer(keys, _SIZE, **more)
    # Their decode accepts grids of one size, ours of any.
    side = keys.read("num_patches", int, _NUM_PATCHES) * tokenizer.image_tokenizer.stride
    return TokenizerConfig.model_validate({**tokenizer.model_dump(), "image_size": side})


def _to_keys(config: TokenizerConfig) -> dict[str, Any]:
    tokenizer = config.image_tokenizer
    if not isinstance(tokenizer, VqganConfig):
        raise CheckpointError("janus_vqgan holds image tokenizers of kind vqgan")
    if tokenizer.normalized_codes == "never":
        raise CheckpointError(
            "janus_vqgan scales codes to length 1, and this tokenizer was trained with normalized_codes=never; train "
            "one with always"
        )
    last = len(tokenizer.multipliers) - 1
    if tokenizer.attention_levels != (last,):
        raise CheckpointError(
            f"janus_vqgan has attention in the last level only, attention_levels=[{last}], not "
            f"{list(tokenizer.attention_levels)}"
        )
    side = config.image_size // tokenizer.stride
    return {**image_blocks.to_keys(tokenizer, _SIZE), "num_patches": side, "dropout": 0.0}


LAYOUT = FamilyLayout(
    "janus_vqgan",
    "JanusVQVAE",
    _rules,
    _to_model,
    _to_keys,
    kind=TokenizerConfig,
    training_only=image_blocks.TRAINING_ONLY,
    auto_class="JanusVQVAE",
)
