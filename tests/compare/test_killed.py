"""A comparison that is killed during a run and restarted gives the results of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.compare.conftest import REPO

VARIANTS = """compare.variants=[
    {name: embedding, overrides: ["model.connector={kind: embedding}"]},
    {name: cross, overrides: ["model.connector.gate_init=1"]}]"""


def results(folder: Path) -> Any:
    """Return ``comparison.json`` without times and folder names."""
    found = json.loads((folder / "comparison.json").read_text())
    for variant in found["variants"]:
        for run in variant["runs"]:
            assert Path(run.pop("folder")).parts[-3] == folder.name
            assert run.pop("timing")["step_seconds"] > 0
    return found


@pytest.mark.resume
@pytest.mark.slow
def test_a_killed_comparison_resumes_and_gives_the_same_results(tmp_path: Path) -> None:
    words = ["stages.0.steps=12", "compare.equal=flops", VARIANTS]
    command = [sys.executable, str(Path(__file__).with_name("program.py")), str(tmp_path), *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = results(tmp_path / "undisturbed")
    assert results(tmp_path / "killed") == expected
    assert "resuming from" in done.stderr
    first, cross = (variant["runs"][0] for variant in expected["variants"])
    step = cross["flops"] / cross["steps"]
    assert first["flops"] <= cross["flops"] < first["flops"] + 1.5 * step
    assert first["steps"] == 12 < cross["steps"]
    assert first["train_loss"] != cross["train_loss"]
