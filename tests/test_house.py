"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "mmscale", "launchers", "benchmarks", "examples")
CODE = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]
FILES = [*CODE, *sorted((REPO / "tests").rglob("*.py"))]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_longer_than_the_wall() -> None:
    lengths = {str(path.relative_to(REPO)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_the_wall() -> None:
    long = [
        f"{path.relative_to(REPO)}:{node.lineno} {node.name}"
        for path in CODE  # Not tests: a reference model's configuration and ours, side by side, may be long.
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_modules_are_named_after_what_they_hold() -> None:
    assert [str(path) for path in FILES if path.stem.lower() in SHAPELESS_NAMES] == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(REPO))
        for path in CODE
        if path.stat().st_size and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert silent == []


def test_nothing_is_pickled_or_left_to_do() -> None:
    forbidden = ("import pickle", "torch.save(", "NotImplementedError", "TODO", "FIXME")
    found = [
        f"{path.relative_to(REPO)}: {word}"
        for path in CODE
        for word in forbidden
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []


def imported(code: str) -> set[str]:
    """Top-level packages that are loaded after ``code`` ran in a fresh interpreter."""
    report = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=REPO)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mmscale", {"deepspeed", "transformers", "torchvision"}),
        ("import mmscale.run.config", {"deepspeed", "transformers", "torchvision", "sympy"}),
        ("import mmscale.models.build, mmscale.objectives.next_token", {"deepspeed", "transformers"}),
        ("import data_pipeline.loader.loader", {"deepspeed", "transformers", "mmscale"}),
        ("import mmscale.cli.main; mmscale.cli.main.build_app(None)", {"torch", "deepspeed", "pydantic", "numpy"}),
        ("import launchers.local, launchers.slurm", {"torch", "deepspeed", "pydantic"}),
    ],
)
@pytest.mark.long
def test_what_an_import_does_not_load(code: str, absent: set[str]) -> None:
    assert imported(code) & absent == set()
