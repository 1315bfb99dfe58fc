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


STEPS = {path: 1 if any(base in RECIPES for base in bases_of(path)) else 2 for path in RUNS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 tells of each run."""
    steps = {str(path): number for path, number in STEPS.items()}
    arguments = {"steps": steps, "folder": str(tmp_path_factory.mktemp("recipes"))}
    return run_ranks("tests.system.recipe_programs:train_recipes", 2, arguments, timeout=500)[0]


def facts(line: dict[str, Any]) -> list[Any]:
    """What must not change: everything but time and memory."""
    rates = [value for key, value in sorted(line.items()) if key.startswith("lr")]
    return [line["step"], line["stage"], line["loss"], line["grad_norm"], line["tokens"], line["samples"], rates]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_all_stages_and_a_resume_in_each(path: Path, trained: dict[str, Any]) -> None:
    stages, whole, resumed = trained[str(path)]
    seen = [[line["stage"], "metric/softmax_z" in line] for line in whole]
    assert seen == [stage for stage in stages for _ in range(STEPS[path])]
    assert all(line["applied"] and line["samples"] for line in whole)
    after = {line["step"]: facts(line) for line in resumed}
    assert after == {line["step"]: facts(line) for line in whole[1::2] if STEPS[path] == 2}
