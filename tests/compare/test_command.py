"""The command on two ranks, with a variant that cannot be trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compare.conftest import REPO, TINY

VARIANTS = """compare.variants=[
    {name: fine, overrides: []},
    {name: broken, overrides: [engine.precision=fp16]}]"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_and_a_variant_that_this_machine_cannot_compute(tmp_path: Path) -> None:
    words = ["compare", str(TINY), f"run_dir={tmp_path}", "--ranks", "2", "--json", "stages.0.steps=3", VARIANTS]
    command = [sys.executable, "-m", "mmscale.cli.main", *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)  # The output of the ranks is on stderr.
    (fine,) = found["variants"]
    assert (fine["name"], fine["runs"][0]["world_size"], fine["runs"][0]["steps"]) == ("fine", 2, 3)
    assert [(each["variant"], each["exit_code"]) for each in found["failed"]] == [("broken", 2)]
    assert "broken, seed 1 failed (exit code 2)" in done.stderr
    assert (tmp_path / "comparison.html").is_file()
