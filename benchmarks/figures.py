"""What every benchmark prints: one table for people, one JSON object for programs."""

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
    """One figure, beside those of peers if there are any.

    Attributes:
        case: What was measured, with its sizes.
        ours: Our figure.
        peers: Figures of others by name; ``limit`` or ``formula`` where a stated value is the reference.
        unit: Unit of all figures.
        lower_is_better: True for times and memory.
        paired: Median over turns of the best peer's figure over ours, where the sides take turns on the same work. It
            replaces the quotient of the medians.
    """

    case: str
    ours: float
    peers: Mapping[str, float]
    unit: str
    lower_is_better: bool = field(default=True, kw_only=True)
    paired: float | None = field(default=None, kw_only=True)

    @classmethod
    def beside(
        cls,
        case: str,
        figures: Mapping[str, float],
        unit: str,
        *,
        lower_is_better: bool = True,
        paired: float | None = None,
    ) -> Case:
        """Make a case from figures by side; the side ``ours`` is ours and the others are peers."""
        peers = {name: figure for name, figure in figures.items() if name != "ours"}
        return cls(case, figures["ours"], peers, unit, lower_is_better=lower_is_better, paired=paired)

    @property
    def ratio(self) -> float | None:
        """How much better ours is than the best peer; None without a peer or where the quotient divides by zero."""
        if self.paired is not None or not self.peers:
            return self.paired
        best = min(self.peers.values()) if self.lower_is_better else max(self.peers.values())
        above, below = (best, self.ours) if self.lower_is_better else (self.ours, best)
        return above / below if below else None

    def line(self) -> str:
        """Return the case as a line for people."""
        figures = [f"ours {self.ours:.4g} {self.unit}"]
        if self.peers:
            figures.append(", ".join(f"{name} {figure:.4g}" for name, figure in self.peers.items()))
        if self.ratio is not None:
            figures.append(f"ratio {self.ratio:.2f}")
        return f"{self.case}: {'; '.join(figures)}"

    def cases(self) -> list[Case]:
        """Return the case itself: a case is the simplest row."""
        return [self]


class Row(Protocol):
    """What a benchmark measures at a time."""

    def line(self) -> str:
        """Return text for people: a line or a table."""

    def cases(self) -> list[Case]:
        """Return the figures for programs."""


RowT = TypeVar("RowT", bound=Row)


def machine() -> dict[str, object]:
    """What the figures depend on."""
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
    """The fastest of ``repeats`` runs after one to warm up: other work on the machine only ever adds time."""
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
    """Measure and print. Every benchmark prints through this function.

    Without ``as_json`` each row is printed as soon as it is measured. Otherwise one object is printed at the end:
    ``{"benchmark", "machine", "cases": [{"case", "ours", "peers", "unit", "ratio"}]}``, ``ratio`` null without peers.

    Args:
        benchmark: Name of the benchmark.
        measure: Yields the rows.
        as_json: Whether to print for programs.
        settings: Options that the figures depend on; they stand beside the machine.

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


def main(benchmark: str, measure: Callable[[], Iterable[Row]]) -> None:
    """Run a benchmark without options of its own from the command line."""
    parser = argparse.ArgumentParser(description=f"Benchmark {benchmark}.")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    show(benchmark, measure, parser.parse_args().json)
