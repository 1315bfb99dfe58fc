"""A run on two nodes of a real SLURM survives every fault, with the values of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.torture import differences
from launchers.restarts import RESTARTS_FILE
from launchers.slurm import Job, submit
from tests.slurm.cluster import Cluster

HERE = Path(__file__).parent
TINY = HERE.parent / "system/tiny.yaml"
STEPS = 80
WORDS = (
    f"max_steps={STEPS}",
    "checkpoint.every_steps=2",
    "data.lanes=2",
    "model.decoder.dropout=0.1",
    "model.decoder.num_layers=2",
    "model.vision.num_layers=1",
    "model.connector.every=2",
    "engine.watchdog={step_seconds: 12, other_seconds: 300}",
)
SLOW_SECONDS = 1.0
PATIENCE_SECONDS = 400


@dataclass
class SlurmRun:
    """A run of two ranks on two nodes, with a brake for its steps."""

    cluster: Cluster
    folder: Path
    number: str = ""

    def submit(self, **changes: Any) -> str:
        """Submit the run and return the number of the job."""
        executable = (sys.executable, str(HERE / "throttled_rank.py"), str(self.brake))
        arguments = ("train", str(TINY), f"run_dir={self.folder}", *WORDS)
        job = Job(arguments=arguments, run_dir=self.folder, nodes=2, executable=executable, **changes)
        return submit(job)[0][0]

    @property
    def brake(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-brake")

    def slow_down(self, after: int, seconds: float = SLOW_SECONDS) -> None:
        """Let each step after the step ``after`` take ``seconds`` longer."""
        partial = self.brake.with_suffix(".partial")
        partial.write_text(f"{after} {seconds}")
        partial.replace(self.brake)

    def state(self, number: str = "") -> dict[str, str]:
        shown = self.cluster.call("scontrol", "show", "job", number or self.number, "-o")
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.log()}"
            assert self.state()["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT"), self.log()
            time.sleep(0.2)

    def log(self) -> str:
        return (self.folder / "logs" / f"slurm-{self.number}.log").read_text()

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the complete lines of a JSON file of the run folder."""
        path = self.folder / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def curve(self) -> list[tuple[Any, ...]]:
        """Return the values that must be equal: all but time and memory."""
        names = ("step", "loss", "grad_norm", "lr", "tokens", "samples")
        return [tuple(line[name] for name in names) for line in self.lines("metrics.jsonl")]

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines("metrics.jsonl")), default=0)

    def saved_step(self) -> int:
        """Return the step of the newest complete checkpoint."""
        found = (self.folder / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit()), default=0)

    def rank(self, rank: int) -> int:
        """Return the process of a rank."""
        for node in self.cluster.nodes:
            for pid in self.cluster.processes(node):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                mine = words[0] == sys.executable.encode() and f"run_dir={self.folder}".encode() in words
                if mine and b"SLURM_PROCID=%d" % rank in variables:
                    return pid
        raise AssertionError(f"rank {rank} does not run: {self.log()}")

    def repair(self) -> None:
        """Start the nodes that are down."""
        for node in self.cluster.nodes:
            self.cluster.start(node)

    def node(self, rank: int) -> str:
        """Return the node of a rank."""
        return self.cluster.call("scontrol", "show", "hostnames", self.state()["NodeList"]).split()[rank]


def save_on_signal(run: SlurmRun) -> None:
    run.cluster.call("scancel", "--signal=USR1", run.number)


def preempt(run: SlurmRun) -> None:
    wide = ("--no-requeue", "--nodes=3", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=sleep 2")
    run.cluster.call("sbatch", *wide)


def kill_rank(run: SlurmRun) -> None:
    os.kill(run.rank(1), signal.SIGKILL)


def stop_rank(run: SlurmRun) -> None:
    os.kill(run.rank(1), signal.SIGSTOP)


def kill_slurmd(run: SlurmRun) -> None:
    run.cluster.kill_slurmd(run.node(1))


def crash_first_node(run: SlurmRun) -> None:
    run.cluster.crash(run.node(0))


def reach_time_limit(run: SlurmRun) -> None:
    hours, minutes, _ = map(int, run.state()["RunTime"].split(":"))
    # Less than --save-seconds remain, so SLURM sends USR1.
    run.cluster.call("scontrol", "update", f"JobId={run.number}", f"TimeLimit={hours * 60 + minutes + 3}")


FAULTS: dict[Callable[[SlurmRun], None], str | None] = {
    save_on_signal: "saved and stopped; requeued",
    kill_slurmd: None,
    preempt: None,
    kill_rank: "rank 1 on n. was killed by SIGKILL; requeued",
    stop_rank: "the watchdog of rank 0 on n. ended the run: the rank on n. does not run; requeued",
    crash_first_node: None,
    reach_time_limit: "saved and stopped; requeued",
}
"""Each fault, and the line that it leaves in the log of the job; None if SLURM may end the script."""
GRACEFUL = (save_on_signal, preempt, reach_time_limit)
"""Faults that lose no step."""


@pytest.fixture(scope="module")
def undisturbed(slurm_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> SlurmRun:
    """A finished run without faults."""
    run = SlurmRun(slurm_cluster, tmp_path_factory.mktemp("undisturbed") / "run")
    run.slow_down(STEPS)
    run.number = run.submit()
    run.wait(lambda: run.state()["JobState"] == "COMPLETED")
    assert [row[0] for row in run.curve()] == list(range(1, STEPS + 1))
    assert run.state()["Restarts"] == "0"
    return run


@pytest.mark.slurm
@pytest.mark.timeout(1500)
def test_every_fault_ends_in_a_resumed_run_with_the_same_values(
    undisturbed: SlurmRun, cluster: Cluster, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, tmp_path / "run")
    run.slow_down(0)
    run.number = run.submit()
    for restarts, (fault, line) in enumerate(FAULTS.items(), 1):
        saved = run.saved_step()
        run.wait(lambda saved=saved: run.saved_step() > saved)  # type: ignore[misc]
        seen = len(run.log())
        fault(run)
        run.wait(lambda restarts=restarts: int(run.state()["Restarts"]) >= restarts)  # type: ignore[misc]
        run.wait(lambda: "COMPLETING" not in run.state()["JobState"])
        reached, saved, starts = run.last_step(), run.saved_step(), len(run.lines("starts/starts.jsonl"))
        run.slow_down(saved + 2)
        if fault is not kill_slurmd:  # The next start must find that node down. Two nodes remain for it.
            run.repair()
        run.wait(lambda starts=starts: len(run.lines("starts/starts.jsonl")) > starts)  # type: ignore[misc]
        run.repair()
        resumed = run.lines("starts/starts.jsonl")[-1]["step"]
        what = f"{fault.__name__}: {run.log()}"
        assert 0 < resumed == saved <= reached < STEPS, what
        assert line is None or re.search(line, run.log()[seen:]), what
        assert resumed == reached or fault not in GRACEFUL, what
    run.slow_down(STEPS)
    run.wait(lambda: run.state()["JobState"] == "COMPLETED")
    assert run.curve() == undisturbed.curve()
    assert differences(undisturbed.folder, run.folder) == (0.0, 0.0)
    blamed = [(record["event"], len(record["failed"])) for record in run.lines(RESTARTS_FILE) if record["failed"]]
    assert blamed == [("down", 1), ("end", 1), ("end", 1)], "a killed slurmd, a killed rank, a stopped rank"


@pytest.mark.slurm
def test_two_jobs_never_work_in_one_folder(undisturbed: SlurmRun, cluster: Cluster, tmp_path: Path) -> None:
    """A job of another name does not wait for the first one. The lock of the folder rejects it."""
    run = SlurmRun(cluster, tmp_path / "run")
    run.slow_down(3, seconds=2)
    run.number = run.submit()
    run.wait(lambda: run.saved_step() > 0)
    second = run.submit(extra=("--job-name=another",), max_restarts=0)
    run.wait(lambda: run.state(second)["JobState"] == "FAILED")
    assert run.state()["JobState"] == "RUNNING"
    said = (run.folder / "logs" / f"slurm-{second}-0.log").read_text()
    assert f"in use by process {run.rank(0)} on" in said
    assert f"SLURM job {run.number}" in said
    reached = run.last_step()
    subprocess.run(["scancel", run.number], check=True)
    assert run.curve()[:reached] == undisturbed.curve()[:reached]
