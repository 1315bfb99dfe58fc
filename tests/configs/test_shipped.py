"""Every YAML file in configs/ is valid, and ``dump`` writes it back unchanged in meaning.

Comparisons have several runs in one file; ``tests/compare/test_config.py`` reads those.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mmscale.config import dump, load
from mmscale.run.config import RunConfig, check_world
from mmscale.run.file_checks import check_files
from mmscale.shrink.run import shrink_run
from tests.configs.files import CONFIGS, FILES, MODELS, REPO, RUNS, model_of, name_of


def schema_of(path: Path) -> type[BaseModel]:
    """configs/models/ holds models and towers alone, everything else whole runs."""
    return type(model_of(path)) if path in MODELS else RunConfig


@functools.cache
def value_of(path: Path) -> Any:
    """Return the value of a file. The caller must be in the folder of the repository."""
    return load(path, [], schema_of(path)).value


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_shipped_config(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    value = value_of(path)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump(value), encoding="utf-8")
    again = load(dumped, [], schema_of(path))
    assert again.value == value
    # "Every default written out": the dump leaves nothing to the next version's defaults.
    assert {origin.kind for origin in again.origins.values()} == {"file"}


def test_the_quickstart_is_among_them() -> None:
    assert CONFIGS / "quickstart.yaml" in FILES


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run_dir_and_max_steps_are_overrides_of_every_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    value = load(path, ["run_dir=elsewhere/x", "max_steps=3"], RunConfig).value
    assert (value.run_dir, value.max_steps) == (Path("elsewhere/x"), 3)
    assert value.stages == value_of(path).stages


@pytest.mark.long
@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_run_has_a_smoke_test_run_that_can_start(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    config = value_of(path)
    small = shrink_run(config, steps=3)
    check_files(small)
    check_world(small, 2)
    dumped = tmp_path / "small.yaml"
    dumped.write_text(dump(small), encoding="utf-8")
    assert dump(load(dumped, [], RunConfig).value) == dump(small)
    same = ("name", "train", "learning_rate", "schedule", "optimizer", "ema", "clip")
    for number, (mine, theirs) in enumerate(zip(small.stages, config.stages, strict=True)):
        assert all(getattr(mine, name) == getattr(theirs, name) for name in same)
        assert small.continues(number) == config.continues(number)
        grids = [(run.stage_media(number).placement, run.stage_media(number).merge) for run in (small, config)]
        assert grids[0] == grids[1]
