"""Find all files in configs/, so that tests cover new ones automatically."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mmscale.config.layers import read_layers
from mmscale.config.validate import validate
from mmscale.models.config import AnyModelConfig, kind_of_model

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("compare", "site"))
"""All models and runs. Comparisons are not included, since each has several runs in one file, nor are site files."""
MODELS = [path for path in FILES if path.parent.name == "models"]
RUNS = [path for path in FILES if path.parent.name != "models"]
RECIPES = [path for path in FILES if path.parent.name == "recipes"]


def bases_of(path: Path) -> list[Path]:
    """Return the base files of a file and of its blocks, one level deep."""
    named = re.findall(r"\bbase: ([^\s}]+)", path.read_text(encoding="utf-8"))
    return [(path.parent / base).resolve() for base in named]


def name_of(path: Path) -> str:
    """Return the name of a file in tests, such as ``models/tiny``."""
    return str(path.relative_to(CONFIGS).with_suffix(""))


@cache
def model_of(path: Path) -> AnyModelConfig:
    """Return the model of a file: the whole file, or the ``model`` block of a run."""
    root = read_layers(path)
    block = root.child("model") or root
    keys = [key for key in ("decoder", "image_tokenizer", "audio") if block.child(key) is not None]
    return validate(block, kind_of_model(keys), str(path))[0]
