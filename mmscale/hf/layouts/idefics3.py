"""Idefics3 and SmolVLM: SigLIP's tower, pixel shuffle with one matrix, and a text decoder.

The reference computes position ids from the fraction of the image at which a patch begins (``bucketize``). Its image
processor makes squares of the tower's size only, for which these ids are 0, 1, 2, ...: plain learned positions.
``smolvlm`` is the same model under another name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder, pixels, text_config, vit
from mmscale.hf.read import PREPROCESSOR, VIDEO_PROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, LinearProjectorConfig
from mmscale.models.vision_config import VisionConfig

_TEXT = "llama"
_TILES = 4
"""Tiles along the longer side of an image in the published models."""
_LANCZOS = 1
_FAKE, _WHOLE = "<fake_token_around_image>", "<global-img>"
_UNREAD = (
    "is_llama_config",
    "neftune_noise_alpha",
    "perceiver_config",
    "pixel_shuffle_factor",
    "transformers.js_config",
)
"""Keys in ``text_config`` of published files that no class of transformers reads."""


def _rules(config: ModelConfig) -> NameRules:
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    return (
        *with_prefix(vit.clip_rules(vision), theirs=("", "model.")),
        *renames(
            ("connector.projector.linear.", "model.connector.modality_projection.proj."),
            ("decoder.embed_tokens.extra_weight", "model.text_model.embed_tokens.weight"),
            ("head.extra_weight", "lm_head.weight"),
            ("decoder.", "model.text_model."),
            ("head.", "lm_head."),
        ),
    )


def layout(model_type: str, architecture: str) -> FamilyLayout:
    """Return the layout of Idefics3 under one of its names."""

    def to_model(keys: Keys) -> ModelConfig:
        text, tower = keys.required_object("text_config"), keys.required_object("vision_config", f"{model_type}_vision")
        keys.read("vocab_size", int, None)  # A repetition; the class reads the one in ``text_config``.
        keys.read("use_reentrant_checkpointing", bool, None)
        for name, kind in (("size", dict), ("max_image_size", dict), ("use_base_siglip", bool)):
            tower.read(name, kind, None)
        vision = vit.to_vision(tower, attention=vit.ATTENTION_BIASES, patch_bias=True)
        tower.read("tie_word_embeddings", bool, None)
        tower.raise_on_unread()
        read = Keys({k: v for k, v in text.given.items() if k not in _UNREAD}, text.where, unread=text.unread)
        model = text_config.to_model(read, _TEXT, tied=text_config.tied(keys, text))
        projector = {"kind": "linear", "merge": keys.positive_int("scale_factor"), "bias": False}
        return ModelConfig.model_validate(
            {
                "decoder": model.decoder,
                "vision": {**vision, **pixels.to_model(keys, pixels.HALF)},
                "connector": {"kind": "embedding", "projector": projector},
            }
        )

    def to_keys(config: ModelConfig) -> dict[str, Any]:
        vision, connector = config.vision, config.connector
        if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
            raise CheckpointError(f"{model_type} holds models with a vision tower and connector.kind=embedding")
        if not isinstance(connector.projector, LinearProjectorConfig):
            raise CheckpointError(f"{model_type} holds projectors of one layer (connector.projector.kind=linear)")
        size = vit.image_size(vision)
        processor = {
            "image_processor_type": "Idefics3ImageProcessor" if model_type == "idefics3" else "SmolVLMImageProcessor",
            "size": {"longest_edge": _TILES * size},
            "max_image_size": {"longest_edge": size},
            "resample": _LANCZOS,
        }
        return {
            "text_config": text_config.to_keys(config, _TEXT),
            "vision_config": {"model_type": f"{model_type}_vision", **vit.to_keys(vision)},
            "scale_factor": connector.projector.merge,
            "tie_word_embeddings": config.decoder.tie_embeddings,
            **pixels.to_keys(vision, **processor),
        }

    return FamilyLayout(
        model_type,
        architecture,
        _rules,
        to_model,
        to_keys,
        (rf"model\.{vit.POSITION_IDS}", *(rf"model\.text_{name}" for name in decoder.UNUSED)),
        auto_class="AutoModelForImageTextToText",
        images=_images if model_type == "idefics3" else _images_and_videos,
    )


def _images_and_videos(source: ImageSource) -> ImageInput:
    """Return the images and videos of SmolVLM 2: each frame is an image that is not split, after its time.

    Source: ``SmolVLMVideoProcessor`` and ``SmolVLMProcessor`` of transformers; where the folder has no value, that of
    SmolVLM2-2.2B-Instruct. The processor writes conversations with videos by a chat template of its own, so that of the
    folder need not know them.
    """
    images, processor = _images(source), source.values.get(PREPROCESSOR) or {}
    block = {**processor, **(source.processor.get(VIDEO_PROCESSOR) or {})}
    sampling = block.get("video_sampling") or {}
    vision = source.config.vision
    assert isinstance(vision, VisionConfig)
    side = vit.image_size(vision)
    tile = (block.get("max_image_size") or {}).get("longest_edge", side)
    if tile // vision.patch_size * vision.patch_size != side:
        note = (
            f"the video processor makes frames of {tile} pixels, of which the tower reads {side}; videos are left out"
        )
        return replace(images, notes=(*images.notes, note))
    longest = (sampling.get("video_size") or block.get("size") or {}).get("longest_edge", _TILES * tile)
    size = {} if tile == side else {"tile_size": tile}
    video = {
        "frames": {
            "kind": "trimmed",
            "per_second": sampling.get("fps") or block.get("fps") or 1,
            "max_frames": sampling.get("max_frames") or block.get("num_frames") or 64,
        },
        "tiling": {"kind": "idefics3", "longest_side": longest, "split": False},
        **size,
        "interpolation": "lanczos",
        "start": [_FAKE, _WHOLE],
        "end": _FAKE,
        "timestamps": "\nFrame from {clock}:",
        "intro": "You are provided the following series of {words} frames from a {duration} [H:MM:SS] video.\n",
        "outro": "\n\n",
    }
    return replace(images, video=video)


def _images(source: ImageSource) -> ImageInput:
    vision, processor = source.config.vision, source.values.get(PREPROCESSOR) or {}
    assert isinstance(vision, VisionConfig)
    found = {"interpolation": "lanczos", **pixels.transforms(source.values, source.where)}
    side = vit.image_size(vision)
    tile = (processor.get("max_image_size") or {}).get("longest_edge", side)
    if tile // vision.patch_size * vision.patch_size != side:
        raise CheckpointError(
            f"{source.where}: the image processor's max_image_size={tile} differs from the tower's {side} pixels; "
            "positions of other crops are not supported"
        )
    layout = {
        "crop_start": _FAKE,
        "end": _FAKE,
        "tile": "<row_{row}_col_{column}>",
        "tile_row_break": "\n",
        "overview": _WHOLE,
        "overview_break": "\n\n",
    }
    tiling = {
        "kind": "idefics3",
        "longest_side": (processor.get("size") or {}).get("longest_edge", _TILES * tile),
        "split": processor.get("do_image_splitting", True),
    }
    size = {} if tile == side else {"size": tile}
    return ImageInput(
        {"kind": "tiles", "interpolation": found["interpolation"], **size, "tiling": tiling, "layout": layout},
        tokens=("<image>",),
    )


LAYOUT = layout("idefics3", "Idefics3ForConditionalGeneration")
