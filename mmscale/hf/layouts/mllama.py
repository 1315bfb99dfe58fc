"""Llama 3.2 Vision: a vision tower over tiles, and cross-attention blocks between the decoder's blocks.

transformers numbers the cross-attention blocks together with the decoder's blocks:

theirs  language_model.model.layers.  0 1 2 3 4 5 ...    with cross_attention_layers 3, 8, ...
ours    decoder.layers.               0 1 2   3 4 ...    connector.blocks.3 runs before decoder.layers.3
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.image_input import ImageInput, ImageSource
from mmscale.hf.keys import Keys
from mmscale.hf.layout import FamilyLayout, NameRule, NameRules, renames
from mmscale.hf.layouts import decoder, pixels
from mmscale.hf.read import PREPROCESSOR
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import CrossAttentionConnectorConfig, LinearProjectorConfig
from mmscale.models.connectors.cross_attention import cross_attention_layers
from mmscale.models.vision_config import TilesConfig, VisionConfig
from mmscale.nn.rope import LearnedPositionsConfig
from mmscale.nn.sizes import MAX_TILES
from mmscale.nn.tile_embed import num_grids, tile_grids

_EXTRA_ROWS = 8
"""Rows of the embedding after the vocabulary. Only images use them; every model of the family has 8."""
_EPS = 1e-5
"""Epsilon of ``layernorm_pre`` and ``layernorm_post``, fixed in transformers. Our towers have one epsilon."""
_TEXT = renames(
    ("decoder.embed_tokens.extra_weight", "language_model.model.embed_tokens.weight"),
    ("decoder.", "language_model.model."),
    ("head.", "language_model.lm_head."),
    ("connector.projector.linear.", "multi_modal_projector."),
)
_ALIASES = (  # transformers 4.52 and later uses these names in memory and writes the old ones.
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=vision_model\.|multi_modal_projector\.)", ""),
)


def _rules(config: ModelConfig) -> NameRules:
    vision, connector = config.vision, config.connector
    assert isinstance(vision, VisionConfig)
    assert isinstance(connector, CrossAttentionConnectorConfig)
    crossing = cross_attention_layers(config.decoder.num_layers, connector.every)
    stack = "language_model.model.layers."
    blocks = [(f"connector.blocks.{layer}.", f"{stack}{layer + before}.") for before, layer in enumerate(crossing)]
    blocks += [
        (f"decoder.layers.{layer}.", f"{stack}{layer + sum(other <= layer for other in crossing)}.")
        for layer in range(config.decoder.num_layers)
    ]
    return (*renames(*blocks), *_TEXT, *_tower_rules(vision))


def _tower_rules(vision: VisionConfig) -> NameRules:
    assert vision.tiles is not None
    table = (num_grids(vision.tiles.max_tiles), -1)
    square = (vision.hidden_dim, vision.channels, vision.patch_size, vision.patch_size)
    positions, pre, post = (f"vision_model.{name}_positional_embedding." for name in ("gated", "pre_tile", "post_tile"))
    layers = [
        (f"vision.{ours}.{{n}}.{part}", f"vision_model.{theirs}.layers.{{n}}.{name}")
        for ours, theirs in (("layers", "transformer"), ("global_layers", "global_transformer"))
        for part, name in (
            ("mlp.up_proj.", "mlp.fc1."),
            ("mlp.down_proj.", "mlp.fc2."),
            ("attention_scale.weight", "gate_attn"),
            ("mlp_scale.weight", "gate_ffn"),
            ("", ""),
        )
    ]
    return (
        NameRule("vision.patch_embed.projection.", "vision_model.patch_embedding.", square),
        NameRule("vision.positions.tile_embedding", f"{positions}tile_embedding.weight", table),
        NameRule("vision.pre_tiles.embedding", f"{pre}embedding.weight", table),
        NameRule("vision.post_tiles.embedding", f"{post}embedding.weight", table),
        *renames(
            ("vision.positions.class_embedding", "vision_model.class_embedding"),
            ("vision.positions.position_embedding", f"{positions}embedding"),
            ("vision.positions.gate", f"{positions}gate"),
            ("vision.pre_tiles.gate", f"{pre}gate"),
            ("vision.post_tiles.gate", f"{post}gate"),
            ("vision.pre_norm.", "vision_model.layernorm_pre."),
            ("vision.post_norm.", "vision_model.layernorm_post."),
            *layers,
        ),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text = keys.required_object("text_config", "mllama_text_model")
    tower = keys.required_object("vision_config", "mllama_vision_model")
    keys.must_be("tie_word_embeddings", False)
    model, every = _text_model(text)
    vision = {**_vision(tower), **pixels.to_model(keys, pixels.CLIP)}
    tower.raise_on_unread()
    connector = {
        "kind": "cross_attention",
        "projector": {"kind": "linear"},
        "every": every,
        "unseen_text": "looks_ahead",  # As in transformers. Meta's own code computes ``silent``.
    }
    return ModelConfig.model_validate({"decoder": model.decoder, "vision": vision, "connector": connector})


def _text_model(text: Keys) -> tuple[ModelConfig, int]:
    """Return the decoder without cross-attention blocks, and ``connector.every``."""
    num_layers, crossing = text.read("num_hidden_layers", int), text.read("cross_attention_layers", list)
    own, every = num_layers - len(crossing), crossing[0] + 1 if crossing else 1
    # Compare the lengths first: num_hidden_layers may be huge here, and the expected list grows with it.
    if len(crossing) != len(range(every - 1, own, every)) or crossing != [
        layer + before for before, layer in enumerate(cross_attention_layers(own, every))
    ]:
        raise CheckpointError(
            f"{text.where}: cross_attention_layers={crossing!r:.80} is not supported, only a "
            "cross-attention block before every n-th block"
        )
    alone = Keys(
        {**text.values, "num_hidden_layers": own, "cross_attention_layers": None}, text.where, unread=text.unread
    )
    alone.must_be("dropout", 0.0)
    model = decoder.to_model(alone, extra_tokens={"rows": _EXTRA_ROWS, "predicted": False})
    alone.raise_on_unread()
    return model, every


def _vision(keys: Keys) -> dict[str, Any]:
    keys.must_be("hidden_act", "gelu")
    keys.must_be("norm_eps", _EPS)
    max_tiles, layers = keys.positive_int("max_num_tiles", MAX_TILES), keys.read("intermediate_layers_indices", list)
    keys.must_be("supported_aspect_ratios", [list(grid) for grid in tile_grids(max_tiles)])
    width, patch = keys.read("hidden_size", int), keys.positive_int("patch_size")
    keys.must_be("vision_output_dim", width * (len(layers) + 1))
    side = keys.read("image_size", int)
    return {
        "patch_size": patch,
        "channels": keys.read("num_channels", int),
        "hidden_dim": width,
        "num_layers": keys.read("num_hidden_layers", int),
        "attention": {"num_heads": keys.read("attention_heads", int)},
        "mlp": {
            "hidden_dim": keys.read("intermediate_size", int),
            "gated": False,
            "activation": "gelu",
            "bias": True,
        },
        "norm": {"kind": "layernorm", "eps": _EPS},
        "positions": {"kind": "learned", "grid": [side // patch, side // patch]},
        "class_token": True,
        "class_feature": True,
        "pre_norm": True,
        "post_norm": True,
        "feature_layers": layers,
        "feature_order": "channels",
        "tiles": {"max_tiles": max_tiles, "global_layers": keys.read("num_global_layers", int)},
    }


def _to_keys(config: ModelConfig) -> dict[str, Any]:
    vision, connector = config.vision, config.connector
    if not isinstance(vision, VisionConfig) or vision.tiles is None:
        raise CheckpointError("mllama holds models with a tower over tiles (vision.tiles)")
    if not isinstance(connector, CrossAttentionConnectorConfig) or not isinstance(
        connector.projector, LinearProjectorConfig
    ):
        raise CheckpointError("mllama holds models with cross-attention (connector.kind) and a linear projector")
    if not isinstance(vision.positions, LearnedPositionsConfig) or vision.positions.grid[0] != vision.positions.grid[1]:
        raise CheckpointError("mllama's towers have learned positions on a square grid")
    decoder_config, side = config.decoder, vision.positions.grid[0] * vision.patch_size
    crossing = cross_attention_layers(decoder_config.num_layers, connector.every)
    text = decoder.to_keys(config.model_copy(update={"vision": None, "connector": None}))
    del text["attention_dropout"], text["bos_token_id"]  # The family lacks the first; the second must not be null.
    return {
        "text_config": {
            **text,
            "model_type": "mllama_text_model",
            "vocab_size": decoder_config.vocab_size,
            "num_hidden_layers": decoder_config.num_layers + len(crossing),
            "cross_attention_layers": [layer + before for before, layer in enumerate(crossing)],
            "dropout": 0.0,
        },
        "vision_config": _vision_keys(vision, vision.tiles, side),
        "image_token_index": decoder_config.vocab_size,
        **pixels.to_keys(
            vision,
            image_processor_type="MllamaImageProcessor",
            size={"height": side, "width": side},
            max_image_tiles=vision.tiles.max_tiles,
            resample=2,
        ),
    }


def _vision_keys(vision: VisionConfig, tiles: TilesConfig, side: int) -> dict[str, Any]:
    return {
        "model_type": "mllama_vision_model",
        "hidden_size": vision.hidden_dim,
        "hidden_act": "gelu",
        "num_hidden_layers": vision.num_layers,
        "num_global_layers": tiles.global_layers,
        "attention_heads": vision.attention.num_heads,
        "num_channels": vision.channels,
        "intermediate_size": vision.mlp.hidden_dim,
        "vision_output_dim": vision.feature_dim,
        "image_size": side,
        "patch_size": vision.patch_size,
        "norm_eps": _EPS,
        "max_num_tiles": tiles.max_tiles,
        "intermediate_layers_indices": list(vision.feature_layers),
        "supported_aspect_ratios": [list(grid) for grid in tile_grids(tiles.max_tiles)],
    }


def _images(source: ImageSource) -> ImageInput:
    vision = source.config.vision
    assert isinstance(vision, VisionConfig)
    assert vision.tiles is not None
    most = (source.values.get(PREPROCESSOR) or {}).get("max_image_tiles") or vision.tiles.max_tiles
    found = {"interpolation": "bilinear", **pixels.transforms(source.values, source.where)}
    tiling = {"kind": "llama", "max_tiles": most}
    return ImageInput(
        {"kind": "tiles", "interpolation": found["interpolation"], "tiling": tiling},
        tokens=("<|image|>",),
    )


LAYOUT = FamilyLayout(
    "mllama",
    "MllamaForConditionalGeneration",
    _rules,
    _to_model,
    _to_keys,
    (r"language_model\.model\.rotary_emb\.inv_freq",),
    _ALIASES,
    modules=(
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
    ),
    auto_class="AutoModelForImageTextToText",
    images=_images,
)
