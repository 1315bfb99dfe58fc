"""The table of worst errors: from any number of processes, the worst of each row, written only after a clean run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FILES = {
    "conftest.py": 'pytest_plugins = ["tests.parity_table"]\n',
    "pytest.ini": "[pytest]\nmarkers = parity\n",
    "test_one.py": """
import pytest
@pytest.mark.parity
@pytest.mark.parametrize("error", [1e-7, 3e-7, 2e-7])
def test_logits(error, parity):
    parity("llama", "logits", error, 1e-6)
    parity("llama", "loss", 0.0, 1e-6)
""",
    "test_two.py": """
import pytest
@pytest.mark.parity
def test_logits(parity):
    parity("llama", "logits", 9e-7, 2e-6)
    parity("fuyu", "logits", 1e-7, 1e-6)
""",
}
PAGE = """before
<!-- table: python -m pytest -m parity --write-parity -->
old
<!-- end of the table -->
after
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "parity.md").write_text(PAGE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--write-parity", *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_worst_of_two_processes(tmp_path: Path) -> None:
    done = run(tmp_path, "-n", "2")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "docs" / "parity.json").read_text()) == [
        {"family": "fuyu", "quantity": "logits", "error": 1e-7, "bound": 1e-6, "comparisons": 1},
        {"family": "llama", "quantity": "logits", "error": 9e-7, "bound": 2e-6, "comparisons": 4},
        {"family": "llama", "quantity": "loss", "error": 0.0, "bound": 1e-6, "comparisons": 3},
    ]
    page = (tmp_path / "docs" / "parity.md").read_text()
    assert "| `llama` | logits | 9.0e-07 | 2.0e-06 | 4 |" in page
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("-->\nafter\n")
    assert "llama        logits  9.0e-07  2.0e-06           4" in done.stdout


def test_a_failure_or_an_unmarked_test_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n@pytest.mark.parity\ndef test_nan(parity):\n    parity('olmo2', 'loss', float('nan'), 1)\n"
        "def test_unmarked(parity):\n    pass\n"
    )
    done = run(tmp_path, "-n", "2", "--dist", "loadfile")
    assert "olmo2, loss: nan, allowed 1.0e+00" in done.stdout
    assert "the fixture parity is for tests marked" in done.stdout
    assert (tmp_path / "docs" / "parity.md").read_text() == PAGE
    assert not (tmp_path / "docs" / "parity.json").exists()
