"""Runs one runner: a task a line on stdin, what was measured as a line of JSON on stdout.

    python -m benchmarks.peers.run NAME
    {"prepare": FOLDER}                              ->  {}
    {"measure": JOB, "seconds": S}                   ->  {"samples": n, "seconds": s, "cpu_seconds": c}

Each task runs in a fork of this process: it starts with nothing but the imports, and leaves nothing behind.
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
"""Of the measured time, spent before it: shuffle buffers fill, files are opened, workers start."""
RESUME_AT = 0.9
_PATIENCE_SECONDS = 300

Figures = dict[str, float]


def cpu_seconds() -> float:
    """CPU time of this process and of its children, those that ended too."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # User, system, and both of children that ended.
        except psutil.NoSuchProcess:  # It ended meanwhile; its time has gone to its parent.
            continue
    return total


def throughput(runner: Any, job: Job, seconds: float) -> Figures:
    """Samples, seconds and CPU-seconds of a stretch in the middle of a run."""
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
    """Seconds from the first call to the first sample behind 90 % of an epoch."""
    state = runner.at(job, int(job.num_samples * RESUME_AT))
    cpu, start = cpu_seconds(), time.perf_counter()
    runner.resumed(job, state)
    seconds = time.perf_counter() - start
    return {"samples": 1, "seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}


def do(runner: Any, task: dict[str, Any]) -> Figures:
    """One task."""
    if "prepare" in task:
        if hasattr(runner, "prepare"):
            runner.prepare(Path(task["prepare"]))
        return {}
    job = Job.parse(task["measure"])
    return resume(runner, job) if job.scenario is Scenario.RESUME else throughput(runner, job, task["seconds"])


def _in_child(runner: Any, task: dict[str, Any], out: int) -> None:
    """Answers and ends this process and all that it started, whatever happens."""
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
            process.kill()  # Workers of peers may take long to leave; nothing of them is needed any more.
        os._exit(status)


def main(name: str) -> None:
    """Does tasks until there are no more."""
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Some peers print.
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
