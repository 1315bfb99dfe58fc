"""Code shared by vision towers with a fixed image size: most use the keys and names of CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import NameRule, NameRules, renames
from mmscale.hf.layouts import pixels
from mmscale.models.config import AnyModelConfig, TowerConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import Activation, DenseMlpConfig
from mmscale.nn.rope import BucketedPositionsConfig, LearnedPositionsConfig

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Their name -> our name."""
ATTENTION_BIASES = {"qkv_bias": True, "out_bias": True}
"""Fields of ``attention`` in CLIP and SigLIP."""
ALIASES = ((r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.(.*)", r"vision_model.\1.\2"),)
"""For folders that store the tower without the prefix ``vision_model.``."""
POSITION_IDS = r"vision_model\.embeddings\.position_ids"
"""Buffer of consecutive numbers that old files contain."""
UNUSED = (
    POSITION_IDS,
    *(r"text_model\..*", r"(text|visual)_projection\.weight", r"logit_(scale|bias)"),
)
"""Tensors of a contrastive model's folder that do not belong to the vision tower."""


def clip_rules(vision: VisionConfig) -> NameRules:
    """Return the rules of a tower under ``vision_model.``, as in CLIP and SigLIP."""
    return (
        convolution("vision_model.embeddings.patch_embedding.weight", vision),
        *renames(
            ("vision.patch_embed.projection.", "vision_model.embeddings.patch_embedding."),
            ("vision.positions.position_embedding", "vision_model.embeddings.position_embedding.weight"),
            ("vision.positions.", "vision_model.embeddings."),
            ("vision.pre_norm.", "vision_model.pre_layrnorm."),
            ("vision.post_norm.", "vision_model.post_layernorm."),
        ),
        *block_rules("vision.", "vision_model.encoder."),
    )


def block_rules(ours: str, theirs: str) -> NameRules:
    """Return the rules of the blocks under these prefixes, for a vision or a text tower."""
    ours, theirs = f"{ours}layers.{{n}}.", f"{theirs}layers.{{n}}."
    names = (
        ("input_layernorm.", "layer_norm1."),
        ("post_attention_layernorm.", "layer_norm2."),
        ("self_attn.o_proj.", "self_attn.out_proj."),
        ("self_attn.", "self_attn."),
        ("mlp.up_proj.", "mlp.fc1."),
        ("mlp.down_proj.", "mlp.fc2."),
    )
    return renames(*((ours + mine, theirs + other) for mine, other in names))


def convolution(theirs: str, vision: VisionConfig) -> NameRule:
    """Return the rule that stores the patch projection as a convolution."""
    shape = (-1, vision.channels, vision.patch_size, vision.patch_size)
    return NameRule("vision.patch_embed.projection.weight", theirs, shape)


def square_side(keys: Keys, name: str) -> int:
    """Return the side of a square in pixels. The file may have one number or a list of two equal numbers.

    Raises:
        CheckpointError: the numbers differ, or the value has another type.
    """
    value = keys.values.get(name)
    if not isinstance(value, list):
        return int(keys.read(name, int))
    keys.read(name, list)
    if len(value) != 2 or value[0] != value[1] or type(value[0]) is not int:
        raise CheckpointError(f"{keys.where}: {name}={value!r} is not supported, only squares")
    return value[0]


def tower_keys(keys: Keys, name: str, family: str) -> Keys:
    """Return the keys of one tower of a contrastive pair: the object ``name``, with the defaults of ``family``.

    Raises:
        CheckpointError: the object is missing.
    """
    # Files from 2022 have the object twice; in transformers the second overrides the first.
    values = {**keys.read(name, dict), **keys.read(f"{name}_dict", dict, {})}
    return Keys(values, f"{keys.where}: {name}", family, keys.unread)


def to_stack(keys: Keys, *, attention: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``vision`` or ``decoder`` that describe the transformer blocks.

    Args:
        keys: Keys of the tower.
        attention: Fields of ``attention`` that the family fixes.

    Raises:
        CheckpointError: our models lack the activation.
    """
    act = activation(keys, "hidden_act")
    return {
        "hidden_dim": keys.read("hidden_size", int),
        "num_layers": keys.read("num_hidden_layers", int),
        "attention": {"num_heads": keys.read("num_attention_heads", int), **attention},
        "mlp": {
            "kind": "dense",
            "hidden_dim": keys.read("intermediate_size", int),
            "gated": False,
            "activation": act,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": keys.read("layer_norm_eps", float)},
    }


def to_vision(keys: Keys, *, attention: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return ``vision`` without ``mean`` and ``std``.

    Args:
        keys: Keys of the tower.
        attention: Fields of ``vision.attention`` that the family fixes.
        **more: Fields of ``vision`` that the family fixes.

    Raises:
        CheckpointError: a key needs a computation that our towers lack.
    """
    keys.must_be("attention_dropout", 0.0)
    image, patch = square_side(keys, "image_size"), square_side(keys, "patch_size")
    if patch < 1:
        raise CheckpointError(f"{keys.describe('patch_size')} must be at least 1")
    return {
        "patch_size": patch,
        "channels": keys.read("num_channels", int),
        **to_stack(keys, attention=attention),
        "positions": {"kind": "learned", "grid": [image // patch] * 2},
        **more,
    }


def to_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of a vision tower.

    Raises:
        CheckpointError: the tower does not have learned positions on a square grid.
    """
    return {
        **stack_keys(vision, vision.mlp),
        "num_channels": vision.channels,
        "image_size": image_size(vision),
        "patch_size": vision.patch_size,
    }


def stack_keys(tower: VisionConfig | DecoderConfig, mlp: DenseMlpConfig) -> dict[str, Any]:
    """Return the keys of a tower's transformer blocks, whose feed-forward is ``mlp``."""
    return {
        "hidden_size": tower.hidden_dim,
        "intermediate_size": mlp.hidden_dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.attention.num_heads,
        "hidden_act": activation_key(mlp.activation),
        "layer_norm_eps": tower.norm.eps,
        "attention_dropout": 0.0,
    }


def activation(keys: Keys, name: str) -> str:
    """Read an activation and return our name of it.

    Raises:
        CheckpointError: our models lack the activation.
    """
    act = keys.read(name, str)
    if act not in ACTIVATIONS:
        raise CheckpointError(f"{keys.where}: {name}={act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def activation_key(ours: Activation) -> str:
    """Return their name of an activation; our name if they lack it, which ``activation`` then rejects."""
    return {mine: theirs for theirs, mine in ACTIVATIONS.items()}.get(ours.value, ours.value)


def image_size(vision: VisionConfig) -> int:
    """Return the side of the tower's square images in pixels; with bucketed positions, that of its table.

    Raises:
        CheckpointError: the tower does not have learned positions on a square grid.
    """
    positions = vision.positions
    tables = LearnedPositionsConfig | BucketedPositionsConfig
    if not isinstance(positions, tables) or positions.grid[0] != positions.grid[1]:
        raise CheckpointError("towers with a fixed image size need learned vision.positions on a square grid")
    return positions.grid[0] * vision.patch_size


def crop_processor_keys(vision: VisionConfig) -> dict[str, Any]:
    """Return the image processor of CLIP and InternViT: resize the shorter side, then crop the center."""
    size = image_size(vision)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    return pixels.to_keys(vision, **processor)


def tower(config: AnyModelConfig) -> VisionConfig:
    """Return the tower. ``FamilyLayout.config_values`` has already checked the type of the config."""
    assert isinstance(config, TowerConfig)
    return config.vision
