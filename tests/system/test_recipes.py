"""Every shipped recipe, found by itself: its twin goes through all stages on two ranks, and resumes in each of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.configs.files import RUNS, name_of
from tests.engine.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.resume]


FAMILIES = list({re.sub(r"-?\d+(\.\d+)?b(-[do])?", "", path.stem): path for path in reversed(RUNS)}.values())
"""One run of each family; further sizes of it are slow tests."""
FURTHER = [path for path in RUNS if path not in FAMILIES]


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what rank 0 reports of each run, by its path. The parameter is the list of runs."""
    arguments = {"paths": [str(path) for path in request.param], "folder": str(tmp_path_factory.mktemp("runs"))}
    program = "tests.system.recipe_programs:train_recipes"
    return run_ranks(program, 2, arguments, timeout=550)[0]


def facts(line: dict[str, Any]) -> list[Any]:
    """What must not change: everything but time and memory."""
    rates = [value for key, value in sorted(line.items()) if key.startswith("lr")]
    return [line["step"], line["stage"], line["loss"], line["grad_norm"], line["tokens"], line["samples"], rates]


@pytest.mark.parametrize(
    ("told", "path"),
    [
        *(pytest.param(FAMILIES, path, id=name_of(path)) for path in FAMILIES),
        *(pytest.param(FURTHER, path, id=name_of(path), marks=pytest.mark.slow) for path in FURTHER),
    ],
    indirect=["told"],
)
def test_all_stages_and_a_resume_in_each(path: Path, told: dict[str, Any]) -> None:
    stages, whole, resumed = told[str(path)]
    seen = [[line["stage"], "metric/softmax_z" in line] for line in whole]
    assert seen == [stage for stage in stages for _ in range(2)]
    assert all(line["applied"] and line["samples"] for line in whole)
    assert {line["step"]: facts(line) for line in resumed} == {line["step"]: facts(line) for line in whole[1::2]}
