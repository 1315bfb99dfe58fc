"""InternVL 3 in transformers' format: InternViT, pixel shuffle, an MLP with a layer norm, and a text decoder.

The class token is dropped after the tower. ``downsample_ratio`` is one over the side of the squares of patches that
become one feature.
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder, internvl_vision, pixels, text_config, vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, MlpProjectorConfig
from mmscale.models.vision_config import VisionConfig

_TEXT = "qwen2"
_NORM_EPS = 1e-5
_MOST_TILES = 12


def _rules(config: ModelConfig) -> NameRules:
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    return (
        *with_prefix(internvl_vision.rules(vision), theirs=("", "vision_tower.")),
        *renames(
            ("connector.projector.norm.", "multi_modal_projector.layer_norm."),
            ("connector.projector.fc1.", "multi_modal_projector.linear_1."),
            ("connector.projector.fc2.", "multi_modal_projector.linear_2."),
        ),
        *with_prefix(decoder.RULES, theirs=("", "language_model.")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    keys.must_be("vision_feature_layer", -1)
    keys.must_be("vision_feature_select_strategy", "default")
    ratio = keys.read("downsample_ratio", float)
    merge = round(1 / ratio)
    if merge < 1 or 1 / merge != ratio:
        raise CheckpointError(f"{keys.describe('downsample_ratio')} is not supported, only 1, 0.5, 0.25, ...")
    text, tower = keys.required_object("text_config"), keys.required_object("vision_config", "internvl_vision")
    vision = internvl_vision.to_tower(tower)
    # The first files keep keys of the authors' code that transformers does not read.
    for name, kind in (("initializer_factor", float), ("drop_path_rate", float), ("use_flash_attn", bool)):
        tower.read(name, kind, None)
    tower.raise_on_unread()
    model = text_config.to_model(_within_context(text), _TEXT, tied=text_config.tied(keys, text))
    projector = {
        "kind": "mlp",
        "merge": merge,
        "norm": "after_merge",
        "norm_eps": _NORM_EPS,
        "activation": vit.activation(keys, "projector_hidden_act"),
    }
    return ModelConfig.model_validate(
        {
            "decoder": model.decoder,
            "vision": {**vision, **pixels.to_model(keys, pixels.IMAGENET)},
            "connector": {"kind": "embedding", "projector": projector},
        }
    )


def _within_context(text: Keys) -> Keys:
    """Return the keys without dynamic RoPE scaling, which changes texts beyond ``max_position_embeddings`` only."""
    values = dict(text.given)
    for name in ("rope_scaling", "rope_parameters"):
        block = values.get(name)
        if isinstance(block, dict) and "dynamic" in (block.get("rope_type"), block.get("type")):
            theta = {} if block.get("rope_theta") is None else {"rope_theta": block["rope_theta"]}
            values[name] = theta
    return Keys(values, text.where, unread=text.unread)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
        raise CheckpointError("internvl holds models with a vision tower and connector.kind=embedding")
    projector = connector.projector
    if not isinstance(projector, MlpProjectorConfig):
        raise CheckpointError("internvl holds projectors of two layers (connector.projector.kind=mlp)")
    side = vit.image_size(vision)
    return {
        "text_config": text_config.to_keys(config, _TEXT),
        "vision_config": {"model_type": "internvl_vision", **internvl_vision.tower_keys(vision)},
        "downsample_ratio": 1 / projector.merge,
        "image_seq_length": (side // vision.patch_size // projector.merge) ** 2,
        "projector_hidden_act": vit.activation_key(projector.activation),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.decoder.tie_embeddings,
        **pixels.to_keys(
            vision,
            image_processor_type="GotOcr2ImageProcessor",
            size={"height": side, "width": side},
            crop_to_patches=True,
            min_patches=1,
            max_patches=_MOST_TILES,
            resample=3,
        ),
    }


def _images(source: ImageSource) -> ImageInput:
    """Return the images and videos.

    The processor of transformers cuts tiles whatever ``crop_to_patches`` is. Eight frames are those of the authors'
    example; the processor takes all frames by default.
    """
    processor = source.values.get(PREPROCESSOR) or {}
    found = {"interpolation": "bicubic", **pixels.transforms(source.values, source.where)}
    tiling = {
        "kind": "internvl",
        "min_tiles": processor.get("min_patches", 1),
        "max_tiles": processor.get("max_patches", _MOST_TILES),
    }
    layout = {"start": "<img>", "end": "</img>"}
    return ImageInput(
        {"kind": "tiles", "interpolation": found["interpolation"], "tiling": tiling, "layout": layout},
        tokens=("<IMG_CONTEXT>",),
        video={
            **layout,
            "frames": {"kind": "uniform", "num_frames": 8, "spread": "middles"},
            "timestamps": "Frame{n}: ",
            "frame_break": "\n",
        },
        video_mark="<video>",
        notes=pixels.size_notes(source),
    )


LAYOUT = FamilyLayout(
    "internvl",
    "InternVLForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    (
        *(rf"vision_tower\.{name}" for name in internvl_vision.UNUSED),
        *(rf"language_model\.{name}" for name in decoder.UNUSED),
    ),
    aliases=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ),
    modules=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    auto_class="AutoModelForImageTextToText",
    images=_images,
)
