"""Examine a GPU machine: ``make gpu-check``, or ``python -m tests.gpu.check [--output FOLDER] [--rehearse]``.

    mmscale doctor     packages, driver, kernels, collectives, storage
    pytest -m gpu      every test with the marker gpu; one that is collected and not run is a failure
    benchmarks.gpu     speed, memory, wait for the loader and stall of a checkpoint

Writes ``check.json`` and the page ``check.md`` into the folder. Exit code 0: everything passed. 1: something failed.
``--rehearse`` runs the same program on the CPU with stand-ins and smoke-test models. It tests the program, not a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.io.atomic import write_whole
from tests.gpu.listing import GpuTest, gpu_tests

REPO = Path(__file__).resolve().parents[2]
_SECONDS, _TIMED_OUT = 8 * 3600, 124
"""Limit of a program; the benchmark has 18 cases of at most 25 minutes."""


@dataclass
class Part:
    """One of the three programs.

    Attributes:
        name: Its command line.
        seconds: Its wall time.
        problems: Why it failed; empty if it passed.
        found: Its result as JSON.
    """

    name: str
    seconds: float
    problems: list[str] = field(default_factory=list)
    found: Any = None


def run(words: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a module of this repository and return it with its seconds; its messages are shown.

    A program that has not ended after ``_SECONDS`` is killed, and has the exit code 124 of timeout(1) and no output.
    """
    print(f"== {' '.join(words)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", *words]
    try:
        done = subprocess.run(
            command, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:  # The page is written all the same.
        done = subprocess.CompletedProcess(command, _TIMED_OUT, stdout="")
    return done, time.monotonic() - start


def doctor(rehearse: bool, folder: Path) -> Part:
    """Examine the machine."""
    words = ["mmscale.cli.main", "doctor", "--json", "--folder", str(folder)]
    words += ["--device", "cpu", "--ranks", "1"] if rehearse else ["--device", "cuda"]
    done, seconds = run(words)
    part = Part("mmscale doctor", seconds, found=parsed(done.stdout))
    if part.found is None:
        part.problems.append(f"exit code {done.returncode}, and no result")
    else:
        lines = [line for line in part.found["lines"] if line["status"] == "failure"]
        part.problems += [f"{line['name']}: {line['found']}" for line in lines]
    return part


def tests(rehearse: bool, folder: Path) -> Part:
    """Run the tests with the marker ``gpu``."""
    report = folder / "tests.xml"
    has_flash = rehearse or importlib.util.find_spec("flash_attn") is not None
    marker = "gpu" + (" and not slow" if rehearse else "") + ("" if has_flash else " and not flash")
    words = ["pytest", "-q", "-p", "no:cacheprovider", "-m", marker, f"--junitxml={report}", "--timeout=1800"]
    words += sorted({test.file for test in gpu_tests()})
    done, seconds = run([*words, "--rehearse-gpu"] if rehearse else words)
    part = Part("pytest -m gpu", seconds)
    if not report.exists():
        part.problems.append(f"exit code {done.returncode}, and no report: {done.stdout[-500:]}")
        return part
    outcomes = read_outcomes(report)
    part.found = {
        "counts": dict(Counter(outcomes.values())),
        "not passed": {name: outcome for name, outcome in outcomes.items() if outcome != "passed"},
        "left out": [] if has_flash else ["tests of flash-attn: the package is not installed"],
    }
    part.problems += [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "passed"]
    part.problems += [f"{test.file}::{test.name}: did not run" for test in absent(outcomes, gpu_tests())]
    return part


def read_outcomes(report: Path) -> dict[str, str]:
    """Return ``passed``, ``failed``, ``error`` or ``skipped`` for each test in a JUnit report."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        children = [child.tag for child in case]
        worst = next((tag for tag in ("error", "failure", "skipped") if tag in children), "passed")
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        outcomes[name] = {"failure": "failed"}.get(worst, worst)
    return outcomes


def absent(outcomes: dict[str, str], known: Sequence[GpuTest]) -> list[GpuTest]:
    """Return the tests of which no case ran."""
    ran = {name.partition("[")[0] for name in outcomes}
    return [test for test in known if f"{test.file}::{test.name}" not in ran]


def benchmark(rehearse: bool, folder: Path) -> Part:
    """Measure."""
    words = ["benchmarks.gpu", "--json", "--folder", str(folder)]
    done, seconds = run([*words, "--rehearse", "--models", "dense 1B", "--steps", "2"] if rehearse else words)
    part = Part("python -m benchmarks.gpu", seconds, found=parsed(done.stdout))
    if done.returncode or part.found is None:
        part.problems.append(f"exit code {done.returncode}: a case failed; the messages above name it")
    return part


def parsed(text: str) -> Any:
    """Return the JSON object at the end of an output; None without one."""
    start = text.find("{")
    try:
        return json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None


def page(parts: Sequence[Part], rehearse: bool) -> str:
    """Return the page for people."""
    first = parts[0].found or {"lines": []}
    lines = ["# GPU check", "", "A rehearsal on the CPU: it says nothing about a GPU." if rehearse else "", ""]
    lines += ["| part | seconds | result |", "|---|---:|---|"]
    for part in parts:
        result = "passed" if not part.problems else f"**{len(part.problems)} problems**"
        lines.append(f"| `{part.name}` | {part.seconds:.0f} | {result} |")
    for part in parts:
        lines += ["", f"## {part.name}", ""]
        lines += [f"- FAILED: {problem}" for problem in part.problems]
        if part is parts[1] and part.found:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in part.found["counts"].items())
            lines += [f"- {counts}", *(f"- left out: {what}" for what in part.found["left out"])]
        if part is parts[2] and part.found:
            lines += ["| case | value | unit |", "|---|---:|---|"]
            lines += [f"| {case['case']} | {case['ours']:.4g} | {case['unit']} |" for case in part.found["cases"]]
    lines += ["", "## Lines of the doctor", "", "| check | status | found |", "|---|---|---|"]
    lines += [f"| {line['name']} | {line['status']} | {line['found']} |" for line in first["lines"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, to test this program")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "gpu-check examines a CUDA device, and torch sees none here: install a driver and a CUDA build of torch "
            "(make setup), or test the program on the CPU: python -m tests.gpu.check --rehearse",
            file=sys.stderr,
        )
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.output) as temporary:
        parts = [each(options.rehearse, Path(temporary).resolve()) for each in (doctor, tests, benchmark)]
    result = {
        "rehearsal": options.rehearse,
        "passed": not any(part.problems for part in parts),
        "parts": {
            part.name: {"seconds": part.seconds, "problems": part.problems, "found": part.found} for part in parts
        },
    }
    write_whole(options.output / "check.json", json.dumps(result, indent=2).encode())
    write_whole(options.output / "check.md", page(parts, options.rehearse).encode())
    for part in parts:
        print(f"{part.name}: {len(part.problems)} problems", *part.problems, sep="\n  ")
    print(f"written: {options.output / 'check.md'} and check.json")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
