"""Vision towers of one size: the keys and names of CLIP, which others kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Row, Rows, rows
from mmscale.hf.layouts import pixels
from mmscale.models.config import AnyModelConfig, TowerConfig
from mmscale.models.decoder import DecoderConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import Activation, DenseMlpConfig
from mmscale.nn.rope import LearnedPositionsConfig

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
"""Theirs -> ours."""
BIASED = {"qkv_bias": True, "out_bias": True}
"""Of ``attention``, as CLIP and SigLIP have it."""
SPELLINGS = ((r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.(.*)", r"vision_model.\1.\2"),)
"""Of folders that hold the tower without its prefix."""
NUMBERS = r"vision_model\.embeddings\.position_ids"
"""Those from 0 on, which old files hold."""
UNUSED = (
    NUMBERS,
    *(r"text_model\..*", r"(text|visual)_projection\.weight", r"logit_(scale|bias)"),  # Of the pair with a text tower.
)
"""What a folder of the whole contrastive model holds beside the tower."""


def clip_rows(vision: VisionConfig) -> Rows:
    """Under ``vision_model.``, as CLIP and SigLIP have them."""
    return (
        convolution("vision_model.embeddings.patch_embedding.weight", vision),
        *rows(
            ("vision.patch_embed.projection.", "vision_model.embeddings.patch_embedding."),
            ("vision.positions.position_embedding", "vision_model.embeddings.position_embedding.weight"),
            ("vision.positions.", "vision_model.embeddings."),
            ("vision.pre_norm.", "vision_model.pre_layrnorm."),
            ("vision.post_norm.", "vision_model.post_layernorm."),
        ),
        *block_rows("vision.", "vision_model.encoder."),
    )


def block_rows(ours: str, theirs: str) -> Rows:
    """Of the blocks under these beginnings, images' or text's."""
    ours, theirs = f"{ours}layers.{{n}}.", f"{theirs}layers.{{n}}."
    names = (
        ("input_layernorm.", "layer_norm1."),
        ("post_attention_layernorm.", "layer_norm2."),
        ("self_attn.o_proj.", "self_attn.out_proj."),
        ("self_attn.", "self_attn."),
        ("mlp.up_proj.", "mlp.fc1."),
        ("mlp.down_proj.", "mlp.fc2."),
    )
    return rows(*((ours + mine, theirs + other) for mine, other in names))


def convolution(theirs: str, vision: VisionConfig) -> Row:
    """The patch projection as a convolution over the image."""
    shape = (-1, vision.channels, vision.patch_size, vision.patch_size)
    return Row("vision.patch_embed.projection.weight", theirs, shape)


def side(keys: Keys, name: str) -> int:
    """A number of pixels, which may be written as two equal ones.

    Raises:
        CheckpointError: it is no side of a square.
    """
    value = keys.values.get(name)
    if not isinstance(value, list):
        return int(keys.take(name, int))
    keys.take(name, list)
    if len(value) != 2 or value[0] != value[1] or type(value[0]) is not int:
        raise CheckpointError(f"{keys.where}: {name}={value!r} is not supported, only squares")
    return value[0]


def tower_block(keys: Keys, name: str, family: str) -> Keys:
    """The keys of a tower of ``family`` in a pair of towers: ``vision_config`` or ``text_config``.

    Raises:
        CheckpointError: there are none.
    """
    # Files of 2022 say it twice; transformers lets the second win.
    values = {**keys.take(name, dict), **keys.take(f"{name}_dict", dict, {})}
    return Keys(values, f"{keys.where}: {name}", family)


def to_stack(keys: Keys, *, attention: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``vision`` or ``decoder``, what their keys say of the blocks.

    Args:
        keys: Theirs.
        attention: Of the block of that name what the family decides.

    Raises:
        CheckpointError: we have no such activation.
    """
    act = activation(keys, "hidden_act")
    return {
        "hidden_dim": keys.take("hidden_size", int),
        "num_layers": keys.take("num_hidden_layers", int),
        "attention": {"num_heads": keys.take("num_attention_heads", int), **attention},
        "mlp": {
            "kind": "dense",
            "hidden_dim": keys.take("intermediate_size", int),
            "gated": False,
            "activation": act,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": keys.take("layer_norm_eps", float)},
    }


def to_vision(keys: Keys, *, attention: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Of ``vision``, what their keys say.

    Args:
        keys: Theirs.
        attention: Of ``vision.attention`` what the family decides.
        **more: Of ``vision`` what the family decides.

    Raises:
        CheckpointError: a key asks for what our towers do not compute.
    """
    keys.must_be("attention_dropout", 0.0)
    image, patch = side(keys, "image_size"), side(keys, "patch_size")
    if patch < 1:
        raise CheckpointError(f"{keys.said('patch_size')} must be at least 1")
    return {
        "patch_size": patch,
        "channels": keys.take("num_channels", int),
        **to_stack(keys, attention=attention),
        "positions": {"kind": "learned", "grid": [image // patch] * 2},
        **more,
    }


def to_keys(vision: VisionConfig) -> dict[str, Any]:
    """Their keys of a tower.

    Raises:
        CheckpointError: it takes images of any size, or of another shape than squares.
    """
    return {
        **stack_keys(vision, vision.mlp),
        "num_channels": vision.channels,
        "image_size": image_size(vision),
        "patch_size": vision.patch_size,
    }


def stack_keys(tower: VisionConfig | DecoderConfig, mlp: DenseMlpConfig) -> dict[str, Any]:
    """Their keys of the blocks of a tower, whose feed-forward is ``mlp``."""
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
    """Ours of a key.

    Raises:
        CheckpointError: we have no such activation.
    """
    act = keys.take(name, str)
    if act not in ACTIVATIONS:
        raise CheckpointError(f"{keys.where}: {name}={act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def activation_key(ours: Activation) -> str:
    """Theirs of one of ours; its own name where there is no other, which is refused when it is read back."""
    return {mine: theirs for theirs, mine in ACTIVATIONS.items()}.get(ours.value, ours.value)


def image_size(vision: VisionConfig) -> int:
    """Side of the images that it takes, pixels.

    Raises:
        CheckpointError: they have none.
    """
    positions = vision.positions
    if not isinstance(positions, LearnedPositionsConfig) or positions.grid[0] != positions.grid[1]:
        raise CheckpointError("towers of one size have no words for vision.positions other than learned on a square")
    return positions.grid[0] * vision.patch_size


def cropped(vision: VisionConfig) -> dict[str, Any]:
    """The processor's file of towers whose images are resized by their shorter side and cropped: CLIP, InternViT."""
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
    """The tower of a configuration that ``Layout`` has found to be one."""
    assert isinstance(config, TowerConfig)
    return config.vision
