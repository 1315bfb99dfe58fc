"""An untrusted ``config.json``: any value of any key is imported or raises ``CheckpointError``, without delay."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.config.layers import read_layers
from mmscale.config.tree import plain
from mmscale.errors import CheckpointError
from mmscale.hf.layouts import layout_for
from mmscale.models.config import AnyModelConfig, read_model_config

MODELS = sorted((Path(__file__).parents[2] / "configs/models").glob("*.yaml"))
_ODD: list[Any] = [math.nan, math.inf, 10**9, 10**18, 10**400, 0, -1, 0.5, "x", [], {}, [[]], True, [None]]


def _changed(held: Any, odd: Iterator[Any]) -> Iterator[Any]:
    """Yield copies of a tree, each with one node replaced by another value."""
    if isinstance(held, dict):
        for key, child in held.items():
            yield from ({**held, key: inner} for inner in _changed(child, odd))
    elif isinstance(held, list) and held:
        yield from ([inner, *held[1:]] for inner in _changed(held[0], odd))
    else:
        yield from itertools.islice(odd, 5)


@pytest.mark.timeout(120)
def test_any_value_in_any_place_is_imported_or_refused() -> None:
    odd = itertools.cycle(_ODD)
    families = set()
    for path in MODELS:
        config: AnyModelConfig = read_model_config(plain(read_layers(path)))
        try:
            layout = layout_for(config)
        except CheckpointError:
            continue
        whole = layout.config_values(config)
        if (family := whole["architectures"][0]) in families:  # MolmoE has the model_type of Molmo, but other keys.
            continue
        families.add(family)
        for values in _changed(whole, odd):
            with contextlib.suppress(CheckpointError):
                layout.model_config(values, "config.json")
    assert len(families) > 8


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", math.nan), ("num_hidden_layers", 10**9), ("rms_norm_eps", math.inf), ("hidden_size", 10**18)],
)
def test_a_number_without_bounds_is_named(key: str, value: float) -> None:
    config = read_model_config(plain(read_layers(MODELS[0].parent / "qwen2-7b.yaml")))
    layout = layout_for(config)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*({key}|num_layers)"):
        layout.model_config(layout.config_values(config) | {key: value}, "config.json")


def _with(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return {**values, key: _with(values.get(key, {}), rest, value) if rest else value}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("model", "path", "value"),
    [
        # Sizes that a layout uses as loop bounds before its result is validated.
        ("llama3.2-11b-vision", "vision_config.max_num_tiles", 10**6),
        ("llama3.2-11b-vision", "text_config.num_hidden_layers", 10**12),
        # Sizes that are divisors.
        ("llama3.2-11b-vision", "vision_config.patch_size", 0),
        ("siglip-so400m", "patch_size", 0),
        ("pixtral-12b", "vision_config.num_attention_heads", 0),
        ("molmo-7b-d", "vision_backbone.image_patch_size", 0),
        ("molmo-7b-d", "vision_backbone.image_num_layers", 0),
    ],
)
def test_a_size_is_checked_before_it_is_used(model: str, path: str, value: int) -> None:
    config = read_model_config(plain(read_layers(MODELS[0].parent / f"{model}.yaml")))
    layout = layout_for(config)
    values = _with(layout.config_values(config), path, value)
    if path == "text_config.num_hidden_layers":  # A block with cross-attention before each of these.
        values = _with(values, "text_config.cross_attention_layers", [0])
    named = "cross_attention_layers" if path == "text_config.num_hidden_layers" else path.split(".")[-1] + "="
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        layout.model_config(values, "config.json")
