"""A run whose step or loader runs out of memory ends with one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import REPO, TINY

STEP = """
import torch
from mmscale.engine.graph import LossGraph
forward, calls = LossGraph.forward, []
def fail(self, *rest, **named):
    calls.append(None)
    return forward(self, *rest, **named) if len(calls) < 4 else torch.empty(1 << 50, dtype=torch.uint8)
LossGraph.forward = fail
"""
DECODE = """
import torch
from data_pipeline.packing.document_builder import DocumentPlan
DocumentPlan.__call__ = lambda self: torch.empty(1 << 50, dtype=torch.uint8)
"""
MAIN = """
import sys
from mmscale.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (STEP, "mmscale: rank 0 ran out of memory in the forward pass of step "),
        (DECODE, "mmscale: rank 0 ran out of memory while it waited for the data of step 1"),
    ],
    ids=["step", "loader"],
)
def test_a_run_out_of_memory_ends_with_a_sentence(tmp_path: Path, patch: str, sentence: str) -> None:
    words = ["train", str(TINY), f"run_dir={tmp_path / 'run'}", "max_steps=4"]
    done = subprocess.run(
        [sys.executable, "-c", patch + MAIN, *words], cwd=REPO, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1, done.stderr
    assert sentence in done.stderr
    assert "you tried to allocate" in done.stderr
    assert "data.packing.max_tokens" in done.stderr
    assert "Traceback" not in done.stderr
    assert "defect" not in done.stderr
