"""The notebook has no stored outputs, runs from its first cell to its last, and learns something."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docs.conftest import checkout  # noqa: F401  A fixture.

nbformat = pytest.importorskip("nbformat", reason="needs the extra `dev`")
NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/first_steps.ipynb"


def test_no_output_is_stored() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


@pytest.mark.slow
def test_every_cell_runs(
    checkout: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from nbclient import NotebookClient

    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=words, display_name="this Python", language="python")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: spec)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(checkout)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+) in 8 steps", printed).groups()
    assert float(last) < float(first)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "arning" not in printed
