"""Run one runner: read one task per line from stdin, write one line of JSON per result to stdout.

    python -m benchmarks.peers.run NAME
    {"prepare": FOLDER}                              ->  {}
    {"measure": JOB, "seconds": S}                   ->  {"samples": n, "seconds": s, "cpu_seconds": c}

Each task runs in a fork of this process, so it starts with the imports only and does not affect later tasks.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.peers.job import Job, Scenario

WARM_UP_SHARE = 0.3
"""Shortest warm-up as a fraction of the measured time; it also takes at least a quarter of an epoch.

Workers start and shuffle buffers fill in this time."""
RESUME_AT = 0.9
_PATIENCE_SECONDS = 300

Figures = dict[str, float]


def cpu_seconds() -> float:
    """Return the CPU time of this process and its children, ended ones included."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # User and system time, and both of ended children.
        except psutil.NoSuchProcess:  # It ended meanwhile; its parent counts its time.
            continue
    return total


def throughput(runner: Any, job: Job, seconds: float) -> Figures:
    """Return samples, seconds and CPU seconds of an interval in the middle of a run."""
    batches = runner.batches(job)
    end = time.perf_counter() + seconds * WARM_UP_SHARE
    warm = max(2 * job.workers, job.num_samples // 4 // max(1, next(batches)))
    while warm > 0 or time.perf_counter() < end:
        next(batches)
        warm -= 1
    samples, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        samples += next(batches)
    return {"samples": samples, "seconds": elapsed, "cpu_seconds": cpu_seconds() - cpu}


def resume(runner: Any, job: Job) -> Figures:
    """Return the seconds of ``runner.resumed`` at 90 % of an epoch: a new loader until its first sample or batch."""
    state = runner.at(job, int(job.num_samples * RESUME_AT))
    cpu, start = cpu_seconds(), time.perf_counter()
    runner.resumed(job, state)
    seconds = time.perf_counter() - start
    return {"samples": 1, "seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}


def do(runner: Any, task: dict[str, Any]) -> Figures:
    """Run one task."""
    if "prepare" in task:
        if hasattr(runner, "prepare"):
            runner.prepare(Path(task["prepare"]))
        return {}
    job = Job.parse(task["measure"])
    return resume(runner, job) if job.scenario is Scenario.RESUME else throughput(runner, job, task["seconds"])


def _in_child(runner: Any, task: dict[str, Any], out: int) -> None:
    """Run one task, print its result, and end this process and its children in any case."""
    status = 1
    try:
        signal.alarm(_PATIENCE_SECONDS)
        answer = json.dumps(do(runner, task))
        os.write(out, answer.encode() + b"\n")
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        for process in psutil.Process().children(recursive=True):
            process.kill()  # Workers of peers may take long to exit, and no result of them is needed.
        os._exit(status)


def main(name: str) -> None:
    """Run tasks until stdin ends."""
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Some peers print to stdout.
    torch.set_num_threads(1)
    runner = importlib.import_module(f"benchmarks.peers.{name}")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _in_child(runner, json.loads(line), out)
        if os.waitpid(child, 0)[1]:
            os.write(out, b'{"failed": 1}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
