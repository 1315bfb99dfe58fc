"""A pytest plugin that collects the worst errors against reference implementations, by family.

    python -m pytest -m parity                     # prints the table
    python -m pytest -m parity --write-parity      # writes tests/parity.json and the table of docs/benchmarks.md

A test marked ``parity`` takes the fixture ``parity`` and calls ``parity(family, quantity, error, bound)``, which fails
at or above the bound. The fixture stores records in a test's ``user_properties``, which xdist sends to the process that
prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

Recorder = Callable[[str, str, float, float], None]
PROPERTY = "parity"
JSON, PAGE = Path("tests/parity.json"), Path("docs/benchmarks.md")
BEGIN, END = "<!-- table: python -m pytest -m parity --write-parity -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Worst:
    """The worst of all comparisons of one quantity of one family.

    Attributes:
        family: Hugging Face's ``model_type``, or the name of a reference.
        quantity: "logits", "loss", "gradients", ...
        error: Largest error of all comparisons.
        bound: Bound of the test with this error.
        comparisons: Number of comparisons.
    """

    family: str
    quantity: str
    error: float
    bound: float
    comparisons: int


def worst_of(records: Iterable[tuple[str, str, float, float]]) -> list[Worst]:
    """Return one row for each family and quantity, sorted."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for family, quantity, error, bound in records:
        groups.setdefault((family, quantity), []).append((error, bound))
    return [Worst(*key, *max(seen), len(seen)) for key, seen in sorted(groups.items())]


def markdown(rows: list[Worst]) -> str:
    """Return the table of docs/benchmarks.md."""
    lines = ["| family | quantity | worst error | bound | comparisons |", "|---|---|---:|---:|---:|"]
    lines += [f"| `{r.family}` | {r.quantity} | {r.error:.1e} | {r.bound:.1e} | {r.comparisons:,} |" for r in rows]
    return "\n".join(lines)


def write(rows: list[Worst], root: Path) -> None:
    """Replace ``tests/parity.json``, and the lines of ``docs/benchmarks.md`` between the two markers."""
    (root / JSON).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    page = root / PAGE
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}", encoding="utf-8")


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Recorder:
    """Return ``parity(family, quantity, error, bound)``. It records an error and fails unless it is below the bound."""
    node = request.node
    assert node.get_closest_marker("parity"), "the fixture parity is for tests marked `parity`"

    def record(family: str, quantity: str, error: float, bound: float) -> None:
        node.user_properties.append((PROPERTY, [family, quantity, float(error), float(bound)]))
        assert error < bound, f"{family}, {quantity}: {error:.2e}, allowed {bound:.1e}"  # A NaN fails, too.

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-parity", action="store_true", help=f"write the errors of `-m parity` to {JSON} and {PAGE}"
    )


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # A worker of xdist has the results of its own tests only.
        return
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = worst_of(value for report in reports for name, value in report.user_properties if name == PROPERTY)
    if rows:
        terminalreporter.section("worst errors against references")
        width = max(len(row.quantity) for row in rows)
        terminalreporter.write_line(f"{'family':12} {'quantity':{width}} {'error':>8} {'bound':>8} comparisons")
        for row in rows:
            terminalreporter.write_line(
                f"{row.family:12} {row.quantity:{width}} {row.error:8.1e} {row.bound:8.1e} {row.comparisons:11,}"
            )
    if config.getoption("--write-parity"):
        if exitstatus or not rows:
            terminalreporter.write_line(f"{JSON} and {PAGE} are unchanged: a test failed, or nothing was compared")
        else:
            write(rows, config.rootpath)
