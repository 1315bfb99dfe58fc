"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "mmscale", "launchers", "benchmarks", "examples")
CODE = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]
FILES = [*CODE, *sorted((REPO / "tests").rglob("*.py"))]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
SHAPELESS_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


@functools.cache
def parsed() -> dict[str, tuple[str | None, list[tuple[str, int]]]]:
    """Return of each module of the packages its docstring, and place and number of lines of its functions."""
    found: dict[str, tuple[str | None, list[tuple[str, int]]]] = {}
    for path in CODE:
        name, tree = str(path.relative_to(REPO)), ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        lengths = [(f"{name}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1) for node in functions]
        found[name] = (ast.get_docstring(tree) if tree.body else "empty", lengths)
    return found


def test_no_file_is_longer_than_the_wall() -> None:
    lengths = {str(path.relative_to(REPO)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_the_wall() -> None:
    """Not in tests: a reference model's configuration and ours, side by side, may be long."""
    lengths = [length for _, lengths in parsed().values() for length in lengths]
    assert [place for place, length in lengths if length > MAX_FUNCTION_LINES] == []


def test_modules_are_named_after_what_they_hold() -> None:
    assert [str(path) for path in FILES if path.stem.lower() in SHAPELESS_NAMES] == []


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, (docstring, _) in parsed().items() if docstring is None] == []


def test_nothing_is_pickled_or_left_to_do() -> None:
    forbidden = ("import pickle", "torch.save(", "NotImplementedError", "TODO", "FIXME")
    found = [
        f"{path.relative_to(REPO)}: {word}"
        for path in CODE
        for word in forbidden
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []


@pytest.mark.parametrize(
    "statements",
    [
        # Each statement runs after those before it, in one interpreter.
        {
            "import launchers.local, launchers.slurm": {"torch", "deepspeed", "pydantic"},
            "import mmscale.cli.main; mmscale.cli.main.build_app(None)": {"torch", "deepspeed", "pydantic", "numpy"},
            "import mmscale": {"deepspeed", "transformers", "torchvision"},
            "import mmscale.run.config": {"deepspeed", "transformers", "torchvision", "sympy"},
            "import mmscale.models.build, mmscale.objectives.next_token": {"deepspeed", "transformers"},
        },
        {"import data_pipeline.loader.loader": {"deepspeed", "transformers", "mmscale"}},
    ],
    ids=["mmscale", "data_pipeline"],
)
@pytest.mark.long
def test_what_an_import_does_not_load(statements: dict[str, set[str]]) -> None:
    report = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    code = "\n".join(["import sys", *(f"{statement}\n{report}" for statement in statements)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    for (statement, absent), loaded in zip(statements.items(), done.stdout.splitlines(), strict=True):
        assert set(loaded.split()) & absent == set(), statement
