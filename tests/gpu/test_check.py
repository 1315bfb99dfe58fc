"""gpu-check refuses machines without a GPU and counts each GPU test that did not run as a failure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.gpu import check, versions
from tests.gpu.listing import PAGE, REPO, GpuTest, gpu_tests, written

REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_x" name="test_a[1]" /><testcase classname="tests.gpu.test_x" name="test_a[2]">
<failure message="wrong" /></testcase><testcase classname="tests.gpu.test_x" name="test_b"><skipped /></testcase>
<testcase classname="tests.gpu.test_x" name="test_c"><error /></testcase></testsuite></testsuites>"""


def test_a_skipped_test_and_one_that_did_not_run_are_failures(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    outcomes = check.read_outcomes(tmp_path / "tests.xml")
    name = "tests/gpu/test_x.py::test_"
    assert outcomes == {f"{name}a[1]": "passed", f"{name}a[2]": "failed", f"{name}b": "skipped", f"{name}c": "error"}
    known = [GpuTest("tests/gpu/test_x.py", "test_a", ""), GpuTest("tests/gpu/test_x.py", "test_d", "")]
    assert check.absent(outcomes, known) == known[1:]


def test_a_machine_without_a_gpu_fails_at_once_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check", "--output", str(tmp_path / "out")])
    assert check.main() == 1
    assert "torch sees none here: install a driver" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_lists_every_gpu_test_with_what_it_shows() -> None:
    tests = gpu_tests()
    assert PAGE.read_text(encoding="utf-8") == written(), "run: python -m tests.gpu.listing"
    assert [test.name for test in tests if not test.shows] == []
    marked = re.compile(r"^\s*(@pytest\.mark\.gpu$|pytestmark.*mark\.gpu)", re.MULTILINE)
    paths = (REPO / "tests").rglob("*.py")
    assert sum(len(marked.findall(path.read_text(encoding="utf-8"))) for path in paths) == len(tests)


def test_the_named_versions_exist_together_and_are_admitted() -> None:
    """``versions.txt`` is a resolution by uv, with its date; pyproject.toml admits it, and the page shows it."""
    text = versions.STORED.read_text(encoding="utf-8")
    found, day = versions.parsed(text), text[2:12]
    assert {"torch", "cuda-toolkit", "deepspeed", "flash-attn"} <= found.keys()
    assert PAGE.read_text(encoding="utf-8") == versions.written(found, day), "run: python -m tests.gpu.versions"
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["flash"]]
    admitted = {each.name: each.specifier for each in map(Requirement, listed)}
    assert [name for name in ("torch", "deepspeed", "flash-attn") if found[name] not in admitted[name]] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_program_runs_on_the_cpu(tmp_path: Path) -> None:
    """With stand-ins of the kernels and smoke-test models: its code works, every GPU test runs and passes."""
    words = [sys.executable, "-m", "tests.gpu.check", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    result = json.loads((tmp_path / "check.json").read_text())
    assert (result["passed"], result["rehearsal"]) == (True, True)
    assert result["parts"]["pytest -m gpu"]["found"]["counts"].keys() == {"passed"}
    cases = [case["case"] for case in result["parts"]["python -m benchmarks.gpu"]["found"]["cases"]]
    assert {case.rpartition(": ")[2] for case in cases} == {
        *("useful tokens", "step", "wait for the loader", "MFU", "peak memory", "stall of a checkpoint")
    }
    assert "A rehearsal on the CPU" in (tmp_path / "check.md").read_text()
