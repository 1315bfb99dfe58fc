"""What every benchmark prints: one table for people, one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        case: What was measured, with its sizes.
        ours: Our figure.
        peers: Theirs, or ``limit`` where a stated limit is the reference.
        unit: Of all figures.
        lower_is_better: True for times and memory.
    """

    case: str
    ours: float
    peers: dict[str, float]
    unit: str
    lower_is_better: bool = field(default=True, kw_only=True)

    @property
    def ratio(self) -> float:
        """Ours to the best peer; above 1 when ours is better."""
        if self.lower_is_better:
            return min(self.peers.values()) / self.ours
        return self.ours / max(self.peers.values())


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


def main(benchmark: str, measure: Callable[[], list[Case]]) -> None:
    """Runs a benchmark from the command line; ``--json`` for programs."""
    parser = argparse.ArgumentParser(description=f"Benchmark {benchmark}.")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    as_json = parser.parse_args().json
    cases = measure()
    if as_json:
        rows = [
            {"case": c.case, "ours": c.ours, "peers": c.peers, "unit": c.unit, "ratio": round(c.ratio, 3)}
            for c in cases
        ]
        print(json.dumps({"benchmark": benchmark, "machine": machine(), "cases": rows}, indent=2))
        return
    for c in cases:
        peers = ", ".join(f"{name} {figure:.4g}" for name, figure in c.peers.items())
        print(f"{c.case}: ours {c.ours:.4g} {c.unit}; {peers}; ratio {c.ratio:.2f}")
