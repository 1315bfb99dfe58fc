"""Every shipped model matches its golden file, and the table in configs/README.md is current."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.configs.files import CONFIGS, model_of, name_of
from tests.golden.describe import COMMAND, FOLDER, describe, files
from tests.golden.table import README, written

RECORDED = {CONFIGS / file.relative_to(FOLDER).with_suffix(".yaml"): file for file in sorted(FOLDER.rglob("*.txt"))}
"""Golden files by configuration. ``files()`` would read every configuration during collection."""


def compare(file: Path, now: str) -> None:
    old = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    changes = list(difflib.unified_diff(old, now.splitlines(), str(file), "now", lineterm="", n=0))
    if changes:
        pytest.fail("\n".join([*changes, f"if this change is intended, run: {COMMAND}"]), pytrace=False)


@pytest.mark.parametrize("path", RECORDED, ids=name_of)
def test_as_recorded(path: Path) -> None:
    compare(RECORDED[path], describe(model_of(path))[0])


def test_the_table_of_configurations() -> None:
    compare(README, written())


def test_no_golden_file_is_missing_or_left_over() -> None:
    assert files() == RECORDED
