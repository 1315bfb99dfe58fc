"""Every shipped recipe, found by itself: its twin goes through all stages on two ranks, and resumes in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.configs.files import RUNS, name_of
from tests.engine.ranks import run_ranks
from tests.system.recipe_programs import STEPS

pytestmark = [pytest.mark.dist, pytest.mark.resume]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Any]:
    """What rank 0 tells of each run."""
    arguments: dict[str, Any] = {"paths": list(map(str, RUNS)), "folder": str(tmp_path_factory.mktemp("recipes"))}
    answers = run_ranks("tests.system.recipe_programs:train_recipes", 2, arguments, timeout=500)
    return dict(zip(RUNS, answers[0], strict=True))


def facts(line: dict[str, Any]) -> list[Any]:
    """What must not change: everything but time and memory."""
    rates = [value for key, value in sorted(line.items()) if key.startswith("lr")]
    return [line["step"], line["stage"], line["loss"], line["grad_norm"], line["tokens"], line["samples"], rates]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_all_stages_and_a_resume_in_each(path: Path, trained: dict[Path, Any]) -> None:
    names, whole, resumed = trained[path]
    assert [line["stage"] for line in whole] == [name for name in names for _ in range(STEPS)]
    assert all(line["applied"] and line["samples"] for line in whole)
    after = {line["step"]: facts(line) for line in resumed}
    assert after == {line["step"]: facts(line) for line in whole[1::STEPS]}
