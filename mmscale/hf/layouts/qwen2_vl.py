"""Qwen2-VL: a tower for images of any size, a merger of 2 x 2 patches, and Qwen 2 with positions on three axes.

The names are those of the published files; version 5 of transformers writes them too.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import axial, decoder, pixels, qwen2
from mmscale.hf.read import VIDEO_PROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.rope import FrequencyLayout

_BLOCK, _THEIRS = "vision.layers.{n}.", "visual.blocks.{n}."
_ACTIVATION = "quick_gelu"
_TEXT = "qwen2_vl_text"


def _rules(config: ModelConfig) -> NameRules:
    assert isinstance(config.vision, VisionConfig)
    mlp = renames((f"{_BLOCK}mlp.up_proj.", f"{_THEIRS}mlp.fc1."), (f"{_BLOCK}mlp.down_proj.", f"{_THEIRS}mlp.fc2."))
    return (*mlp, *shared_rules(config.vision))


def shared_rules(vision: VisionConfig) -> NameRules:
    """Return the name rules of Qwen2-VL and Qwen2.5-VL, which name the tower's feed-forward layers differently."""
    patch = (vision.temporal_patch, vision.patch_size, vision.patch_size)
    return (
        NameRule("vision.patch_embed.projection.", "visual.patch_embed.proj.", shape=(-1, vision.channels, *patch)),
        *(
            NameRule(f"{_BLOCK}self_attn.{name}_proj.", f"{_THEIRS}attn.qkv.", part=part)
            for part, name in enumerate(("q", "k", "v"))
        ),
        *renames(
            (f"{_BLOCK}self_attn.o_proj.", f"{_THEIRS}attn.proj."),
            (f"{_BLOCK}input_layernorm.", f"{_THEIRS}norm1."),
            (f"{_BLOCK}post_attention_layernorm.", f"{_THEIRS}norm2."),
            ("connector.projector.norm.", "visual.merger.ln_q."),
            ("connector.projector.fc1.", "visual.merger.mlp.0."),
            ("connector.projector.fc2.", "visual.merger.mlp.2."),
        ),
        *decoder.RULES,
    )


def to_text(keys: Keys, family: str) -> ModelConfig:
    """Return the model's decoder.

    Args:
        keys: Keys of the folder.
        family: ``model_type`` of its ``text_config``.

    Raises:
        CheckpointError: a key is missing or needs a computation that our models lack.
    """
    tied = keys.read("tie_word_embeddings", bool)
    text = keys.optional_object("text_config", family)
    if text is None:  # Before version 4.52 the decoder's keys are at the top level.
        return _decoder(keys.with_defaults(family), tied)
    model = _decoder(text, tied)
    text.raise_on_unread()
    decoder.check_repeats(keys, text, lambda text: _decoder(text, tied))
    return model


def _to_model(keys: Keys) -> ModelConfig:
    model = to_text(keys, _TEXT)
    vision, merge = _vision(keys.required_object("vision_config", "qwen2_vl_vision"), model.decoder.hidden_dim)
    projector = {"kind": "mlp", "merge": merge, "norm": "before_merge", "hidden_dim": vision["hidden_dim"] * merge**2}
    return ModelConfig.model_validate(
        {
            "decoder": model.decoder,
            "vision": {**vision, **pixels.to_model(keys, pixels.CLIP)},
            "connector": {"kind": "embedding", "projector": projector},
        }
    )


def _decoder(keys: Keys, tied: bool) -> ModelConfig:
    qwen2.check_attention(keys)
    tied = keys.read("tie_word_embeddings", bool, False) or tied
    return decoder.to_model(keys, attention={"qkv_bias": True}, sectioned=True, tie_embeddings=tied)


def _vision(keys: Keys, text_dim: int) -> tuple[dict[str, Any], int]:
    """Return ``vision`` and the side of the squares of patches that are merged."""
    dim, patch, channels = keys.read("embed_dim", int), keys.read("patch_size", int), keys.read("in_channels", int)
    keys.must_be("in_chans", channels)  # The first files repeat the value here; no code reads it.
    keys.must_be("spatial_patch_size", patch)
    keys.must_be("hidden_size", text_dim)
    keys.must_be("hidden_act", _ACTIVATION)
    merge = keys.read("spatial_merge_size", int)
    vision = {
        "patch_size": patch,
        "temporal_patch": keys.read("temporal_patch_size", int),
        "channels": channels,
        "hidden_dim": dim,
        "num_layers": keys.read("depth", int),
        "attention": {"num_heads": keys.read("num_heads", int), "qkv_bias": True, "out_bias": True},
        "mlp": {
            "hidden_dim": dim * keys.read("mlp_ratio", int),
            "gated": False,
            "activation": _ACTIVATION,
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": 1e-6},
        "positions": axial.to_model(keys, FrequencyLayout.SHARED),
        "post_norm": False,
    }
    keys.raise_on_unread()
    return vision, merge


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
        raise CheckpointError("qwen2_vl holds models with a vision tower and connector.kind=embedding")
    merge = connector.projector.merge
    tower = _vision_keys(vision, config.decoder.hidden_dim, merge)
    return {**text_keys(config, _TEXT), "vision_config": tower, **processor_keys(vision, merge)}


def text_keys(config: ModelConfig, family: str) -> dict[str, Any]:
    """Return ``text_config`` with the ``model_type`` ``family``, and the top-level keys of the decoder."""
    text = decoder.to_keys(ModelConfig(decoder=config.decoder))
    tied = text.pop("tie_word_embeddings")  # Version 5 has this key at the top level only.
    return {
        "text_config": {"model_type": family, **text, "use_sliding_window": False},
        "tie_word_embeddings": tied,
    }


def processor_keys(vision: VisionConfig, merge: int) -> dict[str, Any]:
    """Return ``preprocessor_config``."""
    return pixels.to_keys(
        vision,
        image_processor_type="Qwen2VLImageProcessor",
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch,
        merge_size=merge,
    )


def _vision_keys(vision: VisionConfig, text_dim: int, merge: int) -> dict[str, Any]:
    ratio, remainder = divmod(vision.mlp.hidden_dim, vision.hidden_dim)
    if remainder:
        raise CheckpointError(
            f"qwen2_vl's mlp_ratio is a whole number; vision.mlp.hidden_dim={vision.mlp.hidden_dim} is no multiple of "
            f"vision.hidden_dim={vision.hidden_dim}"
        )
    return {
        "model_type": "qwen2_vl_vision",
        "depth": vision.num_layers,
        "embed_dim": vision.hidden_dim,
        "hidden_size": text_dim,
        "hidden_act": _ACTIVATION,
        "mlp_ratio": ratio,
        "num_heads": vision.attention.num_heads,
        "in_channels": vision.channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": merge,
        "temporal_patch_size": vision.temporal_patch,
        **axial.to_keys(vision),
    }


def images(source: ImageSource) -> ImageInput:
    """Return the images and videos of a folder: native size, between two tokens.

    Frames are those of the authors' code, two a second and 4 to 768 of them, unless the folder's video processor
    chooses others. The class of transformers chooses none by default.

    Raises:
        CheckpointError: the video processor makes other patches than the tower reads, or does what we cannot.
    """
    video = {"placeholder": "<|video_pad|>", **_frames(source)}
    return native_images(source, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", video)


def native_images(source: ImageSource, before: str, after: str, image: str, video: dict[str, Any]) -> ImageInput:
    """Return images and videos of native size.

    Args:
        source: The folder.
        before: Token before an image or a video.
        after: Token after it.
        image: Placeholder of a feature of an image.
        video: Further values of ``data.video``.
    """
    found = pixels.transforms(source.values, source.where)
    return ImageInput(
        {"kind": "native", "interpolation": "bicubic", **found, "layout": {"start": before, "end": after}},
        tokens=(image,),
        before=before,
        after=after,
        video={"start": before, "end": after, **video},
    )


def _frames(source: ImageSource) -> dict[str, Any]:
    """Return the frames, their limits of pixels and their filter as in the folder's video processor, if any."""
    block, config = Keys(source.processor, source.where).optional_object(VIDEO_PROCESSOR), source.config
    if block is None:
        return {}
    assert isinstance(config, ModelConfig)
    assert isinstance(config.vision, VisionConfig)
    assert isinstance(config.connector, EmbeddingConnectorConfig)
    block.must_be("patch_size", config.vision.patch_size)
    block.must_be("temporal_patch_size", config.vision.temporal_patch)
    block.must_be("merge_size", config.connector.projector.merge)
    found = pixels.transforms(source.processor, source.where, VIDEO_PROCESSOR)
    if block.read("do_sample_frames", bool, False) and block.given.get("fps") is not None:
        names = {"per_second": "fps", "min_frames": "min_frames", "max_frames": "max_frames"}
        rate = {ours: block.given[theirs] for ours, theirs in names.items() if block.given.get(theirs) is not None}
        found["frames"] = {"kind": "rate", "spread": "starts", **rate}
    return found


LAYOUT = FamilyLayout(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    decoder.UNUSED,
    modules=((r"^visual\.", "model.visual."), (r"^model\.", "model.language_model.")),
    aliases=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    auto_class="AutoModelForImageTextToText",
    images=images,
)
