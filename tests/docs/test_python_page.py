"""docs/python.md: the names of the package are on the page, and its blocks run quietly and give the losses of a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmscale
from tests.docs.conftest import REPO

PAGE = (REPO / "docs/python.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LOSS = re.compile(r"^step (\d+): loss ([\d.]+)", re.MULTILINE)


def test_every_public_name_exists_and_is_on_the_page() -> None:
    assert sorted(mmscale.__all__) == mmscale.__all__
    assert set(mmscale.__all__) <= set(dir(mmscale))
    for name in mmscale.__all__:
        assert getattr(mmscale, name) is not None
        assert f"`{name}" in PAGE or f"`, `{name}" in PAGE, name
    with pytest.raises(AttributeError, match="no attribute 'lost'"):
        _ = mmscale.lost


def test_the_import_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, mmscale; mmscale.__version__; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout == "set()\n"


def python(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        env={**environment, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_the_blocks_run_quietly_and_begin_with_the_same_loss(checkout: Path) -> None:
    """Three loops, one of them the run's own, compute the loss of the first step from the same weights and batch."""
    done = python(checkout, "-c", "\n".join(BLOCKS))
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (float(loss) for step, loss in LOSS.findall(done.stdout) if step == "1")
    lines = (checkout / "runs/python/first/metrics.jsonl").read_text().splitlines()
    assert first == pytest.approx(second, abs=2e-4)
    assert first == pytest.approx(json.loads(lines[0])["loss"], abs=2e-4)
    assert "DeepSpeed" not in done.stdout + done.stderr
    assert "arning" not in done.stdout + done.stderr
    shown = re.findall(r"^(?:Loader|StepBatch|MultimodalBatch|Trained)\(.*$", done.stdout, re.MULTILINE)
    for printed in re.findall(r"^(?:Loader|StepBatch|MultimodalBatch|Trained)\(.*$", PAGE, re.MULTILINE):
        beginning = printed.partition("...")[0]
        assert any(line.startswith(beginning) for line in shown), (printed, shown)
    from PIL import Image

    assert Image.open(checkout / "runs/python/crop.png").size == (32, 32)


@pytest.mark.slow
def test_two_ranks_of_torchrun_run_the_loop_and_the_command(checkout: Path) -> None:
    (checkout / "loop.py").write_text(BLOCKS[-1])
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = python(checkout, *torchrun, "loop.py")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = python(checkout, "loop.py")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    ours, theirs = ([float(loss) for _, loss in LOSS.findall(each.stdout)] for each in (done, alone))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=2e-4)
    words = ("train", "tests/system/tiny.yaml", "run_dir=runs/torchrun", "max_steps=2")
    done = python(checkout, *torchrun, "-m", "mmscale", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    last = (checkout / "runs/torchrun/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 2
    assert json.loads((checkout / "runs/torchrun/result.json").read_text())["world_size"] == 2


def test_python_m_mmscale_is_the_command() -> None:
    done = python(REPO, "-m", "mmscale", "--version")
    assert (done.returncode, done.stdout) == (0, f"mmscale {mmscale.__version__}\n")
