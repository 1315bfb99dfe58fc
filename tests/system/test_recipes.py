"""Every shipped recipe, found by itself: its twin goes through all stages on two ranks, and resumes in each of them.

Files that change no more than the model of another recipe take one step a stage, without a resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.configs.files import RECIPES, RUNS, bases_of, name_of
from tests.engine.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.resume]


SIZES = [path for path in RUNS if any(base in RECIPES for base in bases_of(path))]
FORMS = [path for path in RUNS if path not in SIZES]


def train(paths: list[Path], steps: int, folder: Path) -> dict[str, Any]:
    """What rank 0 tells of each run."""
    arguments = {"steps": {str(path): steps for path in paths}, "folder": str(folder)}
    return run_ranks("tests.system.recipe_programs:train_recipes", 2, arguments, timeout=500)[0]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(FORMS, 2, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(SIZES, 1, tmp_path_factory.mktemp("sizes"))


def facts(line: dict[str, Any]) -> list[Any]:
    """What must not change: everything but time and memory."""
    rates = [value for key, value in sorted(line.items()) if key.startswith("lr")]
    return [line["step"], line["stage"], line["loss"], line["grad_norm"], line["tokens"], line["samples"], rates]


def assert_all_stages(stages: list[Any], lines: list[dict[str, Any]], steps: int) -> None:
    seen = [[line["stage"], "metric/softmax_z" in line] for line in lines]
    assert seen == [stage for stage in stages for _ in range(steps)]
    assert all(line["applied"] and line["samples"] for line in lines)


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_all_stages_and_a_resume_in_each(path: Path, forms: dict[str, Any]) -> None:
    stages, whole, resumed = forms[str(path)]
    assert_all_stages(stages, whole, 2)
    assert {line["step"]: facts(line) for line in resumed} == {line["step"]: facts(line) for line in whole[1::2]}


@pytest.mark.parametrize("path", SIZES, ids=name_of)
def test_all_stages_of_another_size(path: Path, sizes: dict[str, Any]) -> None:
    """Beside what ``test_shrink`` does with every model: a step of its twin."""
    stages, whole, _ = sizes[str(path)]
    assert_all_stages(stages, whole, 1)
