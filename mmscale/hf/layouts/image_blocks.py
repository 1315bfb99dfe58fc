"""Code shared by the families of image tokenizers: name rules of blocks, and keys that both have."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import NameRules, renames
from mmscale.models.config import AnyModelConfig, ModelConfig, TokenizerConfig
from mmscale.models.image_tokenizer import MovqganConfig, VqganConfig

TRAINING_ONLY = r"image_tokenizer\.codebook\.(idle_steps|cluster_sizes|cluster_sums)|discriminator\..*"
"""Statistics of codes (``mmscale/nn/codebook.py``), and the discriminator."""
_GROUPS = 32
"""Groups of every norm in transformers' classes."""


def norm(ours: str, theirs: str, *, coded: bool) -> NameRules:
    """Return the rules of one norm; ``coded``: it depends on the codes."""
    if not coded:
        return renames((f"{ours}.", f"{theirs}."))
    parts = (("norm", "norm_layer"), ("scale", "conv_y"), ("offset", "conv_b"))
    return renames(*((f"{ours}.{mine}.", f"{theirs}.{other}.") for mine, other in parts))


def residual(ours: str, theirs: str, *, coded: bool = False) -> NameRules:
    """Return the rules of a residual block. Prefixes end before the dot and may contain ``{n}``."""
    return (
        *norm(f"{ours}.norm1", f"{theirs}.norm1", coded=coded),
        *norm(f"{ours}.norm2", f"{theirs}.norm2", coded=coded),
        *renames((f"{ours}.shortcut.", f"{theirs}.nin_shortcut."), (f"{ours}.conv", f"{theirs}.conv")),
    )


def tokenizer(config: AnyModelConfig) -> VqganConfig | MovqganConfig:
    """Return the tokenizer. ``FamilyLayout.config_values`` has already checked the type of the config."""
    assert isinstance(config, TokenizerConfig)
    return config.image_tokenizer


def tokenizer_of(config: ModelConfig) -> TokenizerConfig:
    """Return the image tokenizer of a model that draws.

    Raises:
        CheckpointError: the model has none.
    """
    if config.image_tokenizer is None:
        raise CheckpointError(
            "folders of models that draw hold their image tokenizer; set model.image_tokenizer and load its weights"
        )
    return TokenizerConfig(image_tokenizer=config.image_tokenizer)


def to_tokenizer(keys: Keys, size: str, **more: Any) -> TokenizerConfig:
    """Return the configuration of a tokenizer.

    Args:
        keys: Keys of the folder.
        size: Key of the number of codes.
        **more: Fields of ``image_tokenizer`` that the family fixes or reads itself.

    Raises:
        CheckpointError: a key needs a computation that our tokenizers lack.
    """
    keys.must_be("double_latent", False)
    channels = keys.positive_int("in_channels", 64)
    keys.must_be("out_channels", channels)
    block = {
        "base_dim": keys.positive_int("base_channels"),
        "multipliers": keys.read("channel_multiplier", list),
        "blocks_per_level": keys.positive_int("num_res_blocks"),
        "channels": channels,
        "latent_dim": keys.positive_int("latent_channels"),
        "codebook_size": keys.positive_int(size),
        "code_dim": keys.positive_int("embed_dim"),
        "norm_groups": _GROUPS,
        **more,
    }
    return TokenizerConfig.model_validate({"image_tokenizer": block})


def to_keys(config: VqganConfig | MovqganConfig, size: str) -> dict[str, Any]:
    """Return the keys that both families have; ``size`` is the key of the number of codes.

    Raises:
        CheckpointError: transformers' classes lack these norms.
    """
    if config.norm_groups != _GROUPS:
        raise CheckpointError(f"transformers' image tokenizers have norm_groups={_GROUPS}, not {config.norm_groups}")
    return {
        "base_channels": config.base_dim,
        "channel_multiplier": list(config.multipliers),
        "num_res_blocks": config.blocks_per_level,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "latent_channels": config.latent_dim,
        "double_latent": False,
        size: config.codebook_size,
        "embed_dim": config.code_dim,
    }
