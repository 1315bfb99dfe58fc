"""Qwen2.5-VL: Qwen2-VL with a gated tower whose patches attend within windows, RMS norms, and times in seconds."""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames
from mmscale.hf.layouts import axial, decoder, pixels, qwen2_vl
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.models.windows import WindowsConfig
from mmscale.nn.rope import FrequencyLayout

_BLOCK, _THEIRS = "vision.layers.{n}.", "visual.blocks.{n}."
_TEXT = "qwen2_5_vl_text"
_EPS = 1e-6  # Of all norms of tower and merger; no key states it.


def _rules(config: ModelConfig) -> NameRules:
    assert isinstance(config.vision, VisionConfig)
    names = ("gate_proj", "up_proj", "down_proj")
    mlp = renames(*((f"{_BLOCK}mlp.{name}.", f"{_THEIRS}mlp.{name}.") for name in names))
    return (*mlp, *qwen2_vl.shared_rules(config.vision))


def _to_model(keys: Keys) -> ModelConfig:
    model = qwen2_vl.to_text(keys, _TEXT)
    tower = keys.required_object("vision_config", "qwen2_5_vl_vision")
    return ModelConfig.model_validate(to_values(keys, model, tower, tower.read("tokens_per_second", int)))


def to_values(keys: Keys, model: ModelConfig, tower: Keys, per_second: int) -> dict[str, Any]:
    """Return ``decoder``, ``vision`` and ``connector`` of Qwen2.5-VL or of a model with its tower.

    Args:
        keys: Keys of the folder.
        model: The decoder.
        tower: ``vision_config``; all of its keys but ``tokens_per_second`` are read here.
        per_second: Time positions of a second.

    Raises:
        CheckpointError: a key is missing or needs a computation that our models lack.
    """
    vision, merge = _vision(tower, model.decoder.hidden_dim)
    decoder_values = model.decoder.model_dump()
    decoder_values["rope"]["tokens_per_second"] = per_second
    projector = {
        "kind": "mlp",
        "merge": merge,
        "norm": "before_merge",
        "norm_kind": "rmsnorm",
        "norm_eps": _EPS,
        "hidden_dim": vision["hidden_dim"] * merge**2,
    }
    return {
        "decoder": decoder_values,
        "vision": {**vision, **pixels.to_model(keys, pixels.CLIP)},
        "connector": {"kind": "embedding", "projector": projector},
    }


def _vision(keys: Keys, text_dim: int) -> tuple[dict[str, Any], int]:
    """Return ``vision`` and the side of the squares of patches that are merged."""
    dim, patch, channels = keys.read("hidden_size", int), keys.read("patch_size", int), keys.read("in_channels", int)
    keys.must_be("in_chans", channels)  # The first files repeat values under these names; no code reads them.
    keys.must_be("spatial_patch_size", patch)
    keys.must_be("out_hidden_size", text_dim)
    keys.must_be("hidden_act", "silu")
    merge, window = keys.read("spatial_merge_size", int), keys.read("window_size", int)
    layers, depth = keys.read("fullatt_block_indexes", list), keys.read("depth", int)
    side = window // merge // patch * merge  # A window has whole squares of merged patches.
    if side < 1:
        raise CheckpointError(f"{keys.describe('window_size')}: no square of {merge * patch} pixels fits into it")
    frame_layers = [layer for layer in sorted(set(layers)) if 0 <= layer < depth]
    vision = {
        "patch_size": patch,
        "temporal_patch": keys.read("temporal_patch_size", int),
        "channels": channels,
        "hidden_dim": dim,
        "num_layers": depth,
        "attention": {"num_heads": keys.read("num_heads", int), "qkv_bias": True, "out_bias": True},
        "mlp": {"hidden_dim": keys.read("intermediate_size", int), "activation": "silu", "bias": True},
        "norm": {"kind": "rmsnorm", "eps": _EPS},
        "positions": axial.to_model(keys, FrequencyLayout.SHARED),
        "windows": None if len(frame_layers) == depth else {"side": side, "frame_layers": frame_layers},
        "post_norm": False,
    }
    keys.raise_on_unread()
    return vision, merge


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    per_second = positions_per_second(config, "qwen2_5_vl")
    values = keys_of(config, _TEXT, "qwen2_5_vl")
    values["vision_config"] |= {"model_type": "qwen2_5_vl_vision", "tokens_per_second": per_second}
    return values


def positions_per_second(config: ModelConfig, family: str) -> int:
    """Return ``decoder.rope.tokens_per_second``.

    Raises:
        CheckpointError: it is no whole number; ``family`` is named in the message.
    """
    per_second = None if config.decoder.rope is None else config.decoder.rope.tokens_per_second
    if per_second is None or per_second != int(per_second):
        raise CheckpointError(
            f"{family} needs a whole number of time positions a second; decoder.rope.tokens_per_second={per_second}"
        )
    return int(per_second)


def keys_of(config: ModelConfig, text_family: str, family: str) -> dict[str, Any]:
    """Return the keys of decoder, tower and image processor, without ``vision_config.tokens_per_second``.

    Args:
        config: A model with this tower; its sound, if any, is ignored.
        text_family: ``model_type`` of ``text_config``.
        family: ``model_type`` of the folder, for messages.

    Raises:
        CheckpointError: the family cannot express the tower.
    """
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
        raise CheckpointError(f"{family} holds models with a vision tower and connector.kind=embedding")
    merge = connector.projector.merge
    windows = vision.windows or WindowsConfig(frame_layers=tuple(range(vision.num_layers)))
    tower = {
        "depth": vision.num_layers,
        "hidden_size": vision.hidden_dim,
        "out_hidden_size": config.decoder.hidden_dim,
        "hidden_act": "silu",
        "intermediate_size": vision.mlp.hidden_dim,
        "num_heads": vision.attention.num_heads,
        "in_channels": vision.channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": merge,
        "temporal_patch_size": vision.temporal_patch,
        "window_size": windows.side * vision.patch_size,
        "fullatt_block_indexes": list(windows.frame_layers),
        **axial.to_keys(vision),
    }
    return {**qwen2_vl.text_keys(config, text_family), "vision_config": tower, **qwen2_vl.processor_keys(vision, merge)}


LAYOUT = FamilyLayout(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    decoder.UNUSED,
    modules=qwen2_vl.LAYOUT.modules,
    aliases=qwen2_vl.LAYOUT.aliases,
    auto_class="AutoModelForImageTextToText",
    images=qwen2_vl.images,
)
