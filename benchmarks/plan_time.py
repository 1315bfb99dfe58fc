"""The step time that ``mmscale plan`` predicts after calibration, beside the measured one: ``[--json] [--ranks 1 2]``.

    python -m benchmarks.plan_time

For each configuration and number of ranks on the CPU:

    mmscale plan CONFIG --calibrate FILE        measure this machine with the model of CONFIG
    mmscale plan CONFIG --gpu FILE --json       the prediction
    mmscale launch local CONFIG                 the truth: the median over the steps of ``seconds - data_wait_seconds``

Calibration measures steps of at most a few blocks; the run has all of them. Other load on the machine changes both
sides, at different times: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Case, show

CONFIGS: dict[str, tuple[str, list[str]]] = {
    "dense": ("configs/recipes/emoji-text.yaml", []),
    "experts": ("configs/recipes/emoji-moe.yaml", []),
    "vision": ("configs/quickstart.yaml", []),
}
_FIRST = 3
"""Steps that are not counted: allocation, and DeepSpeed's record of the order of modules."""
_QUIET = ["data.workers=0", "evaluation={sets: [], captions: null}", "metrics.tensorboard=false"]


@dataclass(frozen=True)
class TimeRow:
    """One configuration on one number of ranks.

    Attributes:
        measured: Median seconds of a step.
        planned: Seconds of the prediction.
    """

    name: str
    ranks: int
    zero_stage: int
    measured: float
    planned: float

    def line(self) -> str:
        """Return the row for people."""
        return (
            f"{self.name}, {self.ranks} ranks, ZeRO {self.zero_stage}: measured {1000 * self.measured:.0f} ms a step, "
            f"planned {1000 * self.planned:.0f} ms, error {self.planned / self.measured - 1:+.0%}"
        )

    def cases(self) -> list[Case]:
        """Return the values for programs."""
        name = f"{self.name}, {self.ranks} ranks, ZeRO {self.zero_stage}: step"
        return [Case(name, self.planned, {"measured": self.measured}, "s")]


def measure(args: argparse.Namespace) -> Iterator[TimeRow]:
    """Yield a row for each configuration, number of ranks and ZeRO stage."""
    for name in args.configs:
        for ranks in args.ranks:
            for stage in args.stages:
                with tempfile.TemporaryDirectory() as folder:
                    words = [CONFIGS[name][0], *CONFIGS[name][1], *_QUIET, f"engine.zero_stage={stage}"]
                    words.append(f"max_steps={args.steps + _FIRST}")
                    yield TimeRow(name, ranks, stage, *_compare(words, ranks, Path(folder)))


def _compare(words: list[str], ranks: int, folder: Path) -> tuple[float, float]:
    """Return measured and planned seconds of a step."""
    file, processes = str(folder / "machine.yaml"), ["--gpus-per-node", str(ranks)]
    _mmscale("plan", *words, *processes, "--calibrate", file)
    planned = json.loads(_mmscale("plan", *words, *processes, "--gpu", file, "--json"))
    _mmscale("launch", "local", *words, f"run_dir={folder / 'run'}", "--ranks", str(ranks))
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] - line["data_wait_seconds"] for line in lines if "seconds" in line]
    return statistics.median(seconds[_FIRST:]), planned["stages"][0]["step_seconds"]


def _mmscale(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mmscale", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mmscale {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_time", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes on this machine")
    parser.add_argument("--stages", type=int, nargs="+", default=[3], choices=range(4), help="ZeRO stages")
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    show("plan_time", lambda: measure(options), options.json, {"ranks": options.ranks, "stages": options.stages})
