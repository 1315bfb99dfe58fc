"""Every shipped model is, parameter by parameter, what its golden file says."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.configs.files import model_of, name_of
from tests.golden.describe import COMMAND, FOLDER, describe, files

FILES = files()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_as_recorded(path: Path) -> None:
    golden = FILES[path]
    old = golden.read_text(encoding="utf-8").splitlines() if golden.exists() else []
    new = describe(model_of(path)).splitlines()
    changes = list(difflib.unified_diff(old, new, str(golden), "now", lineterm="", n=0))
    if changes:
        pytest.fail("\n".join([*changes, f"if this is wanted: {COMMAND}"]), pytrace=False)


def test_no_golden_file_is_left_over() -> None:
    assert set(FOLDER.rglob("*.txt")) == set(FILES.values())
