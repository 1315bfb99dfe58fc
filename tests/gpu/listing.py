"""The lists of GPU tests and of recipes on fake tensors in docs/gpu.md: ``python -m tests.gpu.listing`` writes them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fake_cuda.recipes import table

REPO = Path(__file__).resolve().parents[2]
PAGE = REPO / "docs/gpu.md"
BEGIN, END = "<!-- list: python -m tests.gpu.listing -->", "<!-- end of the list -->"
RECIPES, END_OF_RECIPES = "<!-- recipes: python -m tests.gpu.listing -->", "<!-- end of the recipes -->"


@dataclass(frozen=True)
class GpuTest:
    """A test function with the marker ``gpu``.

    Attributes:
        file: Its file, relative to the repository.
        name: Its name.
        shows: The first line of its docstring.
    """

    file: str
    name: str
    shows: str


def gpu_tests() -> list[GpuTest]:
    """Return all test functions that are decorated with ``pytest.mark.gpu``, by file."""
    return [test for path in sorted((REPO / "tests").rglob("test_*.py")) for test in _tests_of(path)]


def _tests_of(path: Path) -> Iterator[GpuTest]:
    text = path.read_text(encoding="utf-8")
    if "mark.gpu" not in text:
        return
    for node in ast.parse(text).body:
        marks = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
        if isinstance(node, ast.FunctionDef) and "pytest.mark.gpu" in marks:
            shows = (ast.get_docstring(node) or "").partition("\n")[0]
            yield GpuTest(str(path.relative_to(REPO)), node.name, shows)


def written() -> str:
    """Return the text of docs/gpu.md with up-to-date lists."""
    text = PAGE.read_text(encoding="utf-8")
    text = f"{text.split(RECIPES)[0]}{RECIPES}\n{table()}\n{END_OF_RECIPES}{text.split(END_OF_RECIPES)[1]}"
    rows = ["| test | what it shows |", "|---|---|"]
    rows += [f"| `{Path(test.file).name}`: `{test.name}` | {test.shows} |" for test in gpu_tests()]
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{chr(10).join(rows)}\n{END}{text.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
