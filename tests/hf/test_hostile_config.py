"""A stranger's ``config.json``: any value in any place is imported or refused, quickly, by one type of error."""

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
    """Copies of a tree, each with one node replaced by another value."""
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
        if layout.model_type in families:
            continue
        families.add(layout.model_type)
        for values in _changed(layout.config_values(config), odd):
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
