"""Every YAML under configs/ is legal, and is written back as it was read.

Comparisons are several runs in one file: ``tests/compare/test_config.py`` reads those.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from mmscale.config import dump, load
from mmscale.models.config import ModelConfig
from mmscale.run_config import RunConfig

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "compare")


def schema_of(path: Path) -> type[BaseModel]:
    """configs/models/ holds models alone, everything else whole runs."""
    return ModelConfig if path.parent.name == "models" else RunConfig


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_config(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    value = load(path, [], schema_of(path)).value
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump(value), encoding="utf-8")
    again = load(dumped, [], schema_of(path))
    assert again.value == value
    # "Every default written out": the dump leaves nothing to the next version's defaults.
    assert {origin.kind for origin in again.origins.values()} == {"file"}


def test_the_quickstart_is_among_them() -> None:
    assert CONFIGS / "quickstart.yaml" in FILES


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name != "models"], ids=lambda path: path.name)
def test_run_dir_and_max_steps_are_overrides_of_every_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    value = load(path, ["run_dir=elsewhere/x", "max_steps=3"], RunConfig).value
    assert (value.run_dir, value.max_steps) == (Path("elsewhere/x"), 3)
    assert value.stages == load(path, [], RunConfig).value.stages
