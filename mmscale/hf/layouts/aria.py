"""Aria: SigLIP with bucketed positions, a resampler with queries by image size, and a decoder with experts.

Experts of a layer are stacked, with inputs before outputs: ``experts.fc1.weight`` (E, D, 2 F), gate first, and
``experts.fc2.weight`` (E, F, D). The tower has a norm after its last block that nothing reads.
"""

from __future__ import annotations

import math
from typing import Any

from data_pipeline.images.splits import ARIA_GRIDS
from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Axes, FamilyLayout, NameRule, NameRules, renames, with_prefix
from mmscale.hf.layouts import decoder, pixels, vit
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import EmbeddingConnectorConfig, ResamplerConfig
from mmscale.models.vision_config import VisionConfig
from mmscale.nn.block import DenseMlpConfig
from mmscale.nn.moe import MoeConfig
from mmscale.nn.router import RouterOrder

_TEXT, _VISION = "aria_text", "idefics3_vision"
_BALANCE, _Z = 1e-3, 1e-5
"""Weights of the router losses in Aria's own code (aria/model/moe_lm.py)."""
_LONGER, _SHORTER, _CELL = 980, 336, 490
"""Sizes of ``AriaImageProcessor`` in pixels."""
_FRAMES = 128
"""Frames of a video, of 490 pixels, in the authors' example (inference/notebooks/04_video_understanding.ipynb)."""
_OURS, _THEIRS = "connector.projector.", "multi_modal_projector."
_PROJECTOR = (
    *(
        NameRule(
            f"{_OURS}attention.{name}_proj.{kind}", f"{_THEIRS}cross_attn.multihead_attn.in_proj_{kind}", part=part
        )
        for kind in ("weight", "bias")
        for part, name in enumerate(("q", "k", "v"))
    ),
    *renames(
        (f"{_OURS}query_embedding", f"{_THEIRS}query"),
        (f"{_OURS}query_norm.", f"{_THEIRS}cross_attn.layer_norm."),
        (f"{_OURS}key_norm.", f"{_THEIRS}cross_attn.layer_norm_kv."),
        (f"{_OURS}q_proj.", f"{_THEIRS}cross_attn.q_proj."),
        (f"{_OURS}k_proj.", f"{_THEIRS}cross_attn.k_proj."),
        (f"{_OURS}v_proj.", f"{_THEIRS}cross_attn.v_proj."),
        (f"{_OURS}attention.o_proj.", f"{_THEIRS}cross_attn.multihead_attn.out_proj."),
        (f"{_OURS}linear.", f"{_THEIRS}cross_attn.linear."),
        (f"{_OURS}norm.", f"{_THEIRS}layer_norm."),
        (f"{_OURS}fc1.", f"{_THEIRS}feed_forward.linear_in."),
        (f"{_OURS}fc2.", f"{_THEIRS}feed_forward.linear_out."),
    ),
)


def _rules(config: ModelConfig) -> NameRules:
    vision, mlp, dim = config.vision, config.decoder.mlp, config.decoder.hidden_dim
    assert isinstance(vision, VisionConfig)
    assert isinstance(mlp, MoeConfig)
    fc1, fc2 = (-1, dim, 2 * mlp.expert_dim), (-1, mlp.expert_dim, dim)
    ours, theirs = "decoder.layers.{n}.mlp.", "language_model.model.layers.{n}.mlp."
    return (
        NameRule(f"{ours}experts.gate_up_proj", f"{theirs}experts.fc1.weight", fc1, axes=Axes(fc1, (0, 2, 1))),
        NameRule(f"{ours}experts.down_proj", f"{theirs}experts.fc2.weight", fc2, axes=Axes(fc2, (0, 2, 1))),
        *renames(
            (f"{ours}gate.", f"{theirs}router."),
            (f"{ours}shared_expert.", f"{theirs}shared_experts."),
            ("vision.idle_norm.", "vision_tower.post_layernorm."),
        ),
        *_PROJECTOR,
        *with_prefix(vit.clip_rules(vision), theirs=("vision_model.", "vision_tower.")),
        *with_prefix(decoder.RULES, theirs=("", "language_model.")),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text, tower = keys.required_object("text_config", _TEXT), keys.required_object("vision_config", _VISION)
    keys.must_be("vision_feature_layer", -1)
    keys.read("ignore_index", int, None)  # Used by the loss before version 4.46.
    vision = vit.to_vision(tower, attention=vit.ATTENTION_BIASES, patch_bias=True, post_norm=False, idle_norm=True)
    vision["positions"] = {**vision["positions"], "kind": "bucketed"}
    tower.raise_on_unread()
    queries = _queries(keys)
    model = _decoder(text, keys.read("tie_word_embeddings", bool))
    text.raise_on_unread()
    projector = {"kind": "resampler", "queries": queries, "num_heads": vision["attention"]["num_heads"]}
    return ModelConfig.model_validate(
        {
            "decoder": model.decoder,
            "vision": {**vision, **pixels.to_model(keys, pixels.HALF)},
            "connector": {"kind": "embedding", "projector": projector},
        }
    )


def _queries(keys: Keys) -> list[tuple[int, int]]:
    """Return ``projector.queries``. Their keys are numbers of patches of padded, square images."""
    found = []
    for name, number in keys.read("projector_patch_to_query_dict", dict).items():
        side = math.isqrt(int(name))
        if side**2 != int(name):
            raise CheckpointError(f"{keys.describe('projector_patch_to_query_dict')}: {name} is no square number")
        found.append((side, number))
    keys.must_be("max_value_projector_patch_to_query_dict", max(number for _, number in found))
    return sorted(found)


def _decoder(keys: Keys, tied: bool) -> ModelConfig:
    for name in ("attention_bias", "mlp_bias"):
        keys.must_be(name, False)
    width = keys.read("intermediate_size", int)
    keys.must_be("moe_intermediate_size", width)  # Files of Aria's own code have both keys.
    mlp = {
        "kind": "moe",
        "num_experts": keys.read("moe_num_experts", int),
        "experts_per_token": keys.read("moe_topk", int),
        "expert_dim": width,
        "shared_dim": width * keys.read("moe_num_shared_experts", int),
        "router": RouterOrder.TOPK_THEN_SOFTMAX,
        "balance_coefficient": keys.read("moe_aux_loss_coeff", float, _BALANCE),
        "z_coefficient": keys.read("moe_z_loss_coeff", float, _Z),
    }
    tied = keys.read("tie_word_embeddings", bool, False) or tied
    return decoder.to_model(keys, mlp=mlp, tie_embeddings=tied)


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector, mlp = config.vision, config.connector, config.decoder.mlp
    if not isinstance(vision, VisionConfig) or not isinstance(connector, EmbeddingConnectorConfig):
        raise CheckpointError("aria holds models with a vision tower and connector.kind=embedding")
    if not isinstance(connector.projector, ResamplerConfig):
        raise CheckpointError("aria holds projectors with learned queries (connector.projector.kind=resampler)")
    if not isinstance(mlp, MoeConfig):
        raise CheckpointError("aria holds decoders with experts (decoder.mlp.kind=moe)")
    dense = config.decoder.model_copy(update={"mlp": DenseMlpConfig(hidden_dim=mlp.expert_dim)})
    text = decoder.to_keys(ModelConfig(decoder=dense))
    queries = connector.projector.queries
    return {
        "text_config": {
            "model_type": _TEXT,
            **text,
            "moe_num_experts": mlp.num_experts,
            "moe_topk": mlp.experts_per_token,
            "moe_num_shared_experts": mlp.shared_dim // mlp.expert_dim,
        },
        "vision_config": {"model_type": _VISION, **vit.to_keys(vision)},
        "projector_patch_to_query_dict": {str(side**2): number for side, number in queries},
        "vision_feature_layer": -1,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **pixels.to_keys(
            vision,
            image_processor_type="AriaImageProcessor",
            max_image_size=queries[-1][0] * vision.patch_size,
        ),
    }


def _images(source: ImageSource) -> ImageInput:
    """Return the images and videos.

    No processor reads videos. The frames are those of the authors' example, each an image with its time. Their training
    code (aria/load_video.py) takes eight frames of 980 or 490 pixels without times.
    """
    before, after = "<fim_prefix>", "<fim_suffix>"
    processor = source.values.get(PREPROCESSOR) or {}
    found = {
        "kind": "scaled",
        "longer": processor.get("max_image_size", _LONGER),
        "shorter": processor.get("min_image_size", _SHORTER),
        "interpolation": "bicubic",
        **pixels.transforms(source.values, source.where),
        "layout": {"start": before, "end": after},
    }
    if processor.get("split_image"):
        found["split"] = {"kind": "most_pixels", **_grids(processor.get("split_resolutions"))}
    notes = []
    if found["longer"] != _LONGER or "split" in found:
        notes.append(
            f"AriaProcessor makes images of {_LONGER} pixels and splits none unless its caller says otherwise; here, "
            "images are made as by the image processor of the folder"
        )
    video = {
        "frames": {"kind": "uniform", "num_frames": _FRAMES, "spread": "middles"},
        "scaled": {"longer": min(_CELL, found["longer"]), "shorter": min(found["shorter"], _CELL, found["longer"])},
        "start": before,
        "end": after,
        "timestamps": "[{clock}]",
        "frame_break": "\n",
        "outro": "\n",
    }
    return ImageInput(found, tokens=("<|img|>",), before=before, after=after, video=video, notes=tuple(notes))


def _grids(resolutions: list[list[int]] | None) -> dict[str, Any]:
    """Return ``grids`` and ``cell`` of ``transforms.split`` for the sizes that an image may be split at."""
    if resolutions is None:
        return {"grids": ARIA_GRIDS, "cell": _CELL}
    cell = math.gcd(*(side for size in resolutions for side in size))
    return {"grids": [[side // cell for side in size] for size in resolutions], "cell": cell}


LAYOUT = FamilyLayout(
    "aria",
    "AriaForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    tuple(rf"language_model\.{name}" for name in decoder.UNUSED),
    aliases=(
        (r"^model\.language_model\.(.*)\.experts\.gate_up_proj$", r"language_model.model.\1.experts.fc1.weight"),
        (r"^model\.language_model\.(.*)\.experts\.down_proj$", r"language_model.model.\1.experts.fc2.weight"),
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
