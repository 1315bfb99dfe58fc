"""Output of every benchmark: lines or tables for people, one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch


@dataclass(frozen=True)
class Case:
    """One measured value, with those of the peers if there are any.

    Attributes:
        case: Description of the measurement with its sizes.
        ours: Our value.
        peers: Values of others by name; ``limit`` or ``formula`` if the reference is a stated value.
        unit: Unit of all values.
        lower_is_better: True for times and memory.
        paired: Median over turns of the ratio to the best peer, if the sides take turns on the same work; above 1 if
            ours is better. It replaces the ratio of the medians.
    """

    case: str
    ours: float
    peers: Mapping[str, float]
    unit: str
    lower_is_better: bool = field(default=True, kw_only=True)
    paired: float | None = field(default=None, kw_only=True)

    @classmethod
    def from_sides(
        cls,
        case: str,
        figures: Mapping[str, float],
        unit: str,
        *,
        lower_is_better: bool = True,
        paired: float | None = None,
    ) -> Case:
        """Return a case from values by side; the side ``ours`` is ours and the others are peers."""
        peers = {name: figure for name, figure in figures.items() if name != "ours"}
        return cls(case, figures["ours"], peers, unit, lower_is_better=lower_is_better, paired=paired)

    @property
    def ratio(self) -> float | None:
        """Ratio to the best peer, above 1 if ours is better; None without peers or for a division by zero."""
        if self.paired is not None or not self.peers:
            return self.paired
        best = min(self.peers.values()) if self.lower_is_better else max(self.peers.values())
        above, below = (best, self.ours) if self.lower_is_better else (self.ours, best)
        return above / below if below else None

    def line(self) -> str:
        """Return the case as one line for people."""
        figures = [f"ours {self.ours:.4g} {self.unit}"]
        if self.peers:
            figures.append(", ".join(f"{name} {figure:.4g}" for name, figure in self.peers.items()))
        if self.ratio is not None:
            figures.append(f"ratio {self.ratio:.2f}")
        return f"{self.case}: {'; '.join(figures)}"

    def cases(self) -> list[Case]:
        """Return the case itself."""
        return [self]


class BenchmarkRow(Protocol):
    """A result that a benchmark yields: one or more cases."""

    def line(self) -> str:
        """Return text for people: a line or a table."""

    def cases(self) -> list[Case]:
        """Return the values for programs."""


RowT = TypeVar("RowT", bound=BenchmarkRow)


def machine() -> dict[str, object]:
    """Return the properties of the machine that the values depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        pass
    return platform.processor() or platform.machine()


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the fastest of ``repeats`` runs after one warm-up run: other load on the machine only adds time."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def show(
    benchmark: str,
    measure: Callable[[], Iterable[RowT]],
    as_json: bool,
    settings: Mapping[str, object] | None = None,
) -> list[RowT]:
    """Measure and print. Every benchmark prints with this function.

    Without ``as_json``, print each row as soon as it is measured. With it, print one object at the end:
    ``{"benchmark", "machine", "cases": [{"case", "ours", "peers", "unit", "ratio"}]}``, ``ratio`` null without peers.

    Args:
        benchmark: Name of the benchmark.
        measure: Yields the rows.
        as_json: Whether to print JSON.
        settings: Options that the values depend on; they are merged into ``machine``.

    Returns:
        The rows.
    """
    rows = []
    for row in measure():
        rows.append(row)
        if not as_json:
            print(row.line(), flush=True)
    if as_json:
        cases = [
            {
                "case": each.case,
                "ours": each.ours,
                "peers": dict(each.peers),
                "unit": each.unit,
                "ratio": None if each.ratio is None else round(each.ratio, 3),
            }
            for row in rows
            for each in row.cases()
        ]
        print(
            json.dumps({"benchmark": benchmark, "machine": {**machine(), **(settings or {})}, "cases": cases}, indent=2)
        )
    return rows


def main(benchmark: str, measure: Callable[[], Iterable[BenchmarkRow]]) -> None:
    """Run a benchmark whose only command-line option is ``--json``."""
    parser = argparse.ArgumentParser(description=f"Benchmark {benchmark}.")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    show(benchmark, measure, parser.parse_args().json)
