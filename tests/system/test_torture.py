"""The torture benchmark on a small model: its comparisons, and that it detects a difference."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.torture import differences
from tests.system.conftest import REPO, MakeRun


@pytest.mark.slow
@pytest.mark.resume
def test_two_kills_on_one_and_two_ranks() -> None:
    words = ["--config", "tests/system/tiny.yaml", "--kills", "2", "--steps", "20", "--ranks", "2,1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.torture", *words], cwd=REPO, capture_output=True, text=True, check=True
    )
    cases = {case["case"]: case for case in json.loads(done.stdout)["cases"]}
    assert sum(case["ours"] for name, case in cases.items() if name.startswith("kills: ")) == 2
    assert sum(cases[f"lives on {ranks} ranks"]["ours"] for ranks in (1, 2)) == 3
    assert cases["complaints"]["ours"] == 0
    loss, weight = (cases[f"largest {what} difference"] for what in ("loss", "weight"))
    assert 0 < loss["peers"]["undisturbed"] < 1e-4
    assert loss["ours"] < 1e-4
    assert weight["ours"] < 1e-3


@pytest.mark.slow
@pytest.mark.resume
def test_a_difference_of_two_runs_is_found(fork_run: MakeRun) -> None:
    one, other = (fork_run(name, 1, "max_steps=2", f"seed={seed}") for name, seed in (("one", 1), ("other", 2)))
    for run in (one, other):
        run.finish()
    assert differences(one.folder, one.folder) == (0.0, 0.0)
    loss, weight = differences(one.folder, other.folder)
    lines = [[line["loss"] for line in run.metrics()] for run in (one, other)]
    assert loss == max(abs(a - b) for a, b in zip(*lines, strict=True)) > 0
    assert weight > torch.finfo(torch.float32).eps
