"""The table of worst errors has the worst of all processes, and it is written only if all tests pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.parity_table import BEGIN, END, JSON, PAGE, Worst, markdown

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
TEXT = """before
<!-- table: python -m pytest -m parity --write-parity -->
old
<!-- end of the table -->
after
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for path in (JSON, PAGE):
        (folder / path).parent.mkdir(exist_ok=True)
    (folder / PAGE).write_text(TEXT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--write-parity", *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_worst_of_two_processes(tmp_path: Path) -> None:
    done = run(tmp_path, "-n", "2")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / JSON).read_text()) == [
        {"family": "fuyu", "quantity": "logits", "error": 1e-7, "bound": 1e-6, "comparisons": 1},
        {"family": "llama", "quantity": "logits", "error": 9e-7, "bound": 2e-6, "comparisons": 4},
        {"family": "llama", "quantity": "loss", "error": 0.0, "bound": 1e-6, "comparisons": 3},
    ]
    page = (tmp_path / PAGE).read_text()
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
    assert (tmp_path / PAGE).read_text() == TEXT
    assert not (tmp_path / JSON).exists()


def test_the_page_has_the_table_of_the_json() -> None:
    rows = [Worst(**row) for row in json.loads((REPO / JSON).read_text())]
    assert f"{BEGIN}\n{markdown(rows)}\n{END}" in (REPO / PAGE).read_text()
