"""Llama 3.2 Vision: a tower over tiles, and cross-attention blocks among the decoder's, which share its numbers there.

theirs  language_model.model.layers.  0 1 2 3 4 5 ...    with cross_attention_layers 3, 8, ...
ours    decoder.layers.               0 1 2   3 4 ...    connector.blocks.3 stands before decoder.layers.3
"""

from __future__ import annotations

from typing import Any

from mmscale.errors import CheckpointError
from mmscale.hf.keys import Keys
from mmscale.hf.layout import Layout, Row, Rows, rows
from mmscale.hf.layouts import decoder, pixels
from mmscale.models.config import ModelConfig
from mmscale.models.connector_config import CrossAttentionConnectorConfig, LinearProjectorConfig
from mmscale.models.connectors.cross_attention import insertion_layers
from mmscale.models.vision_config import TilesConfig, VisionConfig
from mmscale.nn.rope import LearnedPositionsConfig
from mmscale.nn.sizes import MOST_TILES
from mmscale.nn.tile_embed import num_grids, tile_grids

_EXTRA_ROWS = 8
"""Rows of the embedding behind the vocabulary, which only images use; the family has always so many."""
_EPS = 1e-5
"""Of the norms before and behind the tower's blocks, whatever ``norm_eps`` says."""
_TEXT = rows(
    ("decoder.embed_tokens.extra_weight", "language_model.model.embed_tokens.weight"),
    ("decoder.", "language_model.model."),
    ("head.", "language_model.lm_head."),
    ("connector.projector.linear.", "multi_modal_projector."),
)
_SPELLINGS = (  # From names of the modules themselves (transformers 4.52 and later) to those that it still writes.
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=vision_model\.|multi_modal_projector\.)", ""),
)


def _rows(config: ModelConfig) -> Rows:
    vision, connector = config.vision, config.connector
    assert isinstance(vision, VisionConfig)
    assert isinstance(connector, CrossAttentionConnectorConfig)
    crossing = insertion_layers(config.decoder.num_layers, connector.every)
    stack = "language_model.model.layers."
    blocks = [(f"connector.blocks.{layer}.", f"{stack}{layer + before}.") for before, layer in enumerate(crossing)]
    blocks += [
        (f"decoder.layers.{layer}.", f"{stack}{layer + sum(other <= layer for other in crossing)}.")
        for layer in range(config.decoder.num_layers)
    ]
    return (*rows(*blocks), *_TEXT, *_tower_rows(vision))


def _tower_rows(vision: VisionConfig) -> Rows:
    assert vision.tiles is not None
    table = (num_grids(vision.tiles.max_tiles), -1)
    square = (vision.hidden_dim, vision.channels, vision.patch_size, vision.patch_size)
    places, pre, post = (f"vision_model.{name}_positional_embedding." for name in ("gated", "pre_tile", "post_tile"))
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
        Row("vision.patch_embed.projection.", "vision_model.patch_embedding.", square),
        Row("vision.positions.tile_embedding", f"{places}tile_embedding.weight", table),
        Row("vision.pre_tiles.embedding", f"{pre}embedding.weight", table),
        Row("vision.post_tiles.embedding", f"{post}embedding.weight", table),
        *rows(
            ("vision.positions.class_embedding", "vision_model.class_embedding"),
            ("vision.positions.position_embedding", f"{places}embedding"),
            ("vision.positions.gate", f"{places}gate"),
            ("vision.pre_tiles.gate", f"{pre}gate"),
            ("vision.post_tiles.gate", f"{post}gate"),
            ("vision.pre_norm.", "vision_model.layernorm_pre."),
            ("vision.post_norm.", "vision_model.layernorm_post."),
            *layers,
        ),
    )


def _to_model(keys: Keys) -> ModelConfig:
    text = keys.needed("text_config", "mllama_text_model")
    tower = keys.needed("vision_config", "mllama_vision_model")
    keys.must_be("tie_word_embeddings", False)
    model, every = _text_model(text)
    vision = {**_vision(tower), **pixels.to_model(keys, pixels.CLIP)}
    tower.finish()
    connector = {"kind": "cross_attention", "projector": {"kind": "linear"}, "every": every}
    return ModelConfig.model_validate({"decoder": model.decoder, "vision": vision, "connector": connector})


def _text_model(text: Keys) -> tuple[ModelConfig, int]:
    """The decoder alone, and before every how many of its blocks one with cross-attention stands."""
    num_layers, crossing = text.take("num_hidden_layers", int), text.take("cross_attention_layers", list)
    own, every = num_layers - len(crossing), crossing[0] + 1 if crossing else 1
    # The lengths first: num_hidden_layers has no bound yet.
    if len(crossing) != len(range(every - 1, own, every)) or crossing != [
        layer + before for before, layer in enumerate(insertion_layers(own, every))
    ]:
        raise CheckpointError(
            f"{text.where}: cross_attention_layers={crossing!r:.80} is not supported, only one before every n-th block"
        )
    alone = Keys({**text.values, "num_hidden_layers": own, "cross_attention_layers": None}, text.where)
    alone.must_be("dropout", 0.0)
    model = decoder.to_model(alone, extra_tokens={"rows": _EXTRA_ROWS, "predicted": False})
    alone.finish()
    return model, every


def _vision(keys: Keys) -> dict[str, Any]:
    keys.must_be("hidden_act", "gelu")
    keys.must_be("norm_eps", _EPS)
    max_tiles, layers = keys.size("max_num_tiles", MOST_TILES), keys.take("intermediate_layers_indices", list)
    keys.must_be("supported_aspect_ratios", [list(grid) for grid in tile_grids(max_tiles)])
    width, patch = keys.take("hidden_size", int), keys.size("patch_size")
    keys.must_be("vision_output_dim", width * (len(layers) + 1))
    side = keys.take("image_size", int)
    return {
        "patch_size": patch,
        "channels": keys.take("num_channels", int),
        "hidden_dim": width,
        "num_layers": keys.take("num_hidden_layers", int),
        "attention": {"num_heads": keys.take("attention_heads", int)},
        "mlp": {
            "hidden_dim": keys.take("intermediate_size", int),
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
        "tiles": {"max_tiles": max_tiles, "global_layers": keys.take("num_global_layers", int)},
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
    crossing = insertion_layers(decoder_config.num_layers, connector.every)
    text = decoder.to_keys(config.model_copy(update={"vision": None, "connector": None}))
    del text["attention_dropout"], text["bos_token_id"]  # No key of this family; and one that may not be null.
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


LAYOUT = Layout(
    "mllama",
    "MllamaForConditionalGeneration",
    _rows,
    _to_model,
    _to_keys,
    (r"language_model\.model\.rotary_emb\.inv_freq",),
    _SPELLINGS,
    auto_class="AutoModelForImageTextToText",
)
