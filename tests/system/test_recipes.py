"""Every shipped recipe: its smoke-test model trains in all stages on two ranks, and resumes in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.configs.files import RUNS, name_of
from tests.engine.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.resume]


_EACH_KIND = {
    "qwen2-vl-2b": "images are embedded",
    "llama3.2-11b-vision": "images are attended; pairs of answers",
    "aria": "experts and images",
    "janus-1.3b": "draws images",
    "emoji-vq": "an image tokenizer",
    "emoji-contrast": "pairs of image and text",
    "emoji-grow": "the model grows",
}
"""A recipe of each kind of run, and what is special about it. The others are slow tests.

Faster tests train text with experts (``tests/hf/test_text_families.py``), and images that are embedded and attended
(``tests/hf/test_nvlm.py``).
"""
FIRST = [path for path in RUNS if path.stem in _EACH_KIND]
FURTHER = [path for path in RUNS if path not in FIRST]


def train_all(paths: list[Path], folder: Path) -> dict[str, Any]:
    """Return what rank 0 reports of each run, by its path. One pair of ranks trains all of them."""
    arguments = {"paths": [str(path) for path in paths], "folder": str(folder)}
    return run_ranks("tests.system.recipe_programs:train_recipes", 2, arguments, timeout=550)[0]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_all(FIRST, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_all(FURTHER, tmp_path_factory.mktemp("further"))


def facts(line: dict[str, Any]) -> list[Any]:
    """Return the values that must be equal: all but time and memory."""
    rates = [value for key, value in sorted(line.items()) if key.startswith("lr")]
    return [line["step"], line["stage"], line["loss"], line["grad_norm"], line["tokens"], line["samples"], rates]


def check(stages: list[Any], whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    seen = [[line["stage"], "metric/softmax_z" in line] for line in whole]
    assert seen == [stage for stage in stages for _ in range(2)]
    assert all(line["applied"] and line["samples"] for line in whole)
    assert {line["step"]: facts(line) for line in resumed} == {line["step"]: facts(line) for line in whole[1::2]}


@pytest.mark.parametrize("path", FIRST, ids=name_of)
def test_all_stages_and_a_resume_in_each(path: Path, first: dict[str, Any]) -> None:
    check(*first[str(path)])


@pytest.mark.slow
@pytest.mark.parametrize("path", FURTHER, ids=name_of)
def test_all_stages_and_a_resume_in_each_of_the_others(path: Path, further: dict[str, Any]) -> None:
    check(*further[str(path)])
