"""pyproject.toml declares every third-party package that the code imports."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions

from tests.floors import requirements, untried_floors
from tests.test_house import REPO

FIRST_PARTY = {"benchmarks", "data_pipeline", "launchers", "mmscale", "tests"}
SHIPPED = ("data_pipeline", "mmscale", "launchers")


def pyproject() -> str:
    return (REPO / "pyproject.toml").read_text(encoding="utf-8")


def declared(table: str) -> set[str]:
    """Normalised names of the distributions in a list of requirements; extras count for ``table`` of all of them."""
    text = pyproject()
    if table == "dependencies":
        body = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    else:
        body = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)[1]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([A-Za-z0-9._-]+)[^"]*"', body)}


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """Top-level module and place of each absolute import."""
    for path in sorted((REPO / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                yield name.partition(".")[0], f"{path.relative_to(REPO)}:{node.lineno}"


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Return the distributions of each importable top-level name. It takes seconds: it reads all file lists."""
    return packages_distributions()


def undeclared(folders: tuple[str, ...], requirements: set[str]) -> dict[str, str]:
    distributions = installed()
    known = FIRST_PARTY | set(sys.stdlib_module_names)
    return {
        module: place
        for folder in folders
        for module, place in imported(folder)
        if module not in known
        and not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions.get(module, [module])} & requirements
    }


def test_the_packages_import_what_is_declared() -> None:
    assert undeclared(SHIPPED, declared("dependencies") | declared("extras")) == {}


def test_the_tests_import_what_is_declared() -> None:
    """``timm`` is optional: its test is skipped without it. ``benchmarks/peers`` needs further systems."""
    own = {"timm"} | {path.stem for path in (REPO / "examples").rglob("*.py")}
    found = undeclared(("tests",), declared("dependencies") | declared("extras"))
    assert {module: place for module, place in found.items() if module not in own} == {}


def test_the_oldest_python_is_the_same_everywhere() -> None:
    """The README, the type checker and the linter name the oldest Python that pyproject.toml admits."""
    (oldest,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', pyproject(), re.MULTILINE)
    assert f'target-version = "py{oldest.replace(".", "")}"' in pyproject()
    assert f'python_version = "{oldest}"' in pyproject()
    for page in ("README.md", "Makefile"):
        assert f"{oldest} or newer" in (REPO / page).read_text(encoding="utf-8"), page


def test_a_floor_that_a_resolution_did_not_install_is_named() -> None:
    text = 'dependencies = [\n  "a-b>=1.2",  # Why.\n  "c>=2,<3",\n]\nhf = ["d>=5"]\nother = ["e>=1"]\n'
    assert untried_floors(text, "a-b==1.2.3\nc==2.0\nd==5.0.1+cpu\n") == []
    assert untried_floors(text, "a-b==1.3\nc==2.0\nd==6.0\n") == [
        "a-b>=1.2: 1.3 was installed",
        "d>=5: 6.0 was installed",
    ]
    assert set(requirements(pyproject())) > {"torch", "deepspeed", "transformers", "pytest"}
