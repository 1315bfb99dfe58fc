"""What configs/ holds, found by itself."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mmscale.config.layers import read_layers
from mmscale.config.validate import validate
from mmscale.models.config import AnyModelConfig, ModelConfig, TowerConfig

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
"""All, models and runs."""
MODELS = [path for path in FILES if path.parent.name == "models"]
RUNS = [path for path in FILES if path.parent.name != "models"]
RECIPES = [path for path in FILES if path.parent.name == "recipes"]


def bases_of(path: Path) -> list[Path]:
    """Files that this one or blocks in it begin with, one level deep."""
    named = re.findall(r"\bbase: ([^\s}]+)", path.read_text(encoding="utf-8"))
    return [(path.parent / base).resolve() for base in named]


def name_of(path: Path) -> str:
    """``models/tiny``: how tests call a file."""
    return str(path.relative_to(CONFIGS).with_suffix(""))


@cache
def model_of(path: Path) -> AnyModelConfig:
    """The model of a file: all of it, or the ``model`` block of a run."""
    root = read_layers(path)
    block = root.child("model") or root
    if block.child("decoder") is None:
        return validate(block, TowerConfig, str(path))[0]
    return validate(block, ModelConfig, str(path))[0]
