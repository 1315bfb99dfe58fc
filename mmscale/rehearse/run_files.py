"""Rehearse the small files of all ranks in the run folder: heartbeats, the lock, and the volume of logs.

The files are written and read on this machine's file system, so times are its own. The numbers of operations are those
that the shared file system of the big run would see.
"""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data_pipeline.history.sample_log import COLUMNS, LogSegment
from data_pipeline.order.state import LoaderState
from mmscale.engine.engine import StepReport
from mmscale.engine.step_clock import StepSpans
from mmscale.engine.watchdog import Limits, Watchdog
from mmscale.io.lock import BEAT_SECONDS, FolderLock
from mmscale.metrics.run_log import LoggedStage, RunLog
from mmscale.rehearse.data_order import RehearsedData
from mmscale.rehearse.report import Basis, Report
from mmscale.run.config import RunConfig

HEARTBEATS, LOCK, LOGS = "heartbeats", "lock", "logs"
_DAY = 86_400
_LOGGED_STEPS = 50
_PROGRESS_BYTES = 120
"""Bytes of a progress line of rank 0."""
_WATCHED = ("open", "os.rename", "os.listdir", "os.scandir", "os.mkdir", "os.remove")


class FileOperations:
    """Counts the files that this thread opens, renames, lists and removes, by Python's audit events.

    ``stat`` has no event. One hook serves all instances, because Python cannot remove a hook.
    """

    _counts: Counter[str] | None = None
    _thread = 0
    _installed = False

    def __enter__(self) -> Counter[str]:
        cls = FileOperations
        if not cls._installed:
            cls._installed = True
            sys.addaudithook(cls._hear)
        cls._thread, cls._counts = threading.get_ident(), Counter()
        return cls._counts

    def __exit__(self, *exception: object) -> None:
        FileOperations._counts = None

    @staticmethod
    def _hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], int):
            return  # A file object around an open file.
        counts = FileOperations._counts
        if counts is not None and event in _WATCHED and threading.get_ident() == FileOperations._thread:
            counts[event] += 1


def rehearse_heartbeats(
    report: Report, run_dir: Path, limits: Limits, world_size: int, *, most_per_second: float
) -> None:
    """Write a heartbeat of every rank, then read all of them as a rank does that reports a hang.

    Args:
        report: Gets the figures and findings.
        run_dir: An empty folder.
        limits: Limits of the watchdog.
        world_size: Number of ranks.
        most_per_second: Limit of file operations per second of the shared file system.
    """
    (run_dir / HEARTBEATS).mkdir(parents=True)
    if limits.step is None:
        report.add(HEARTBEATS, "not rehearsed", "engine.watchdog.step_seconds is null: no rank writes a heartbeat")
        return
    watchdogs = [Watchdog(run_dir, limits, rank, world_size) for rank in range(world_size)]
    with FileOperations() as counts:
        report.timed(HEARTBEATS, "write the heartbeats of all ranks", lambda: [each.beat() for each in watchdogs])
    # Each heartbeat also asks for the verdict of another rank, which is one ``stat``.
    operations = (sum(counts.values()) + world_size) / world_size
    per_second = operations * world_size / watchdogs[0].every_seconds
    report.add(HEARTBEATS, "seconds between two heartbeats of a rank", watchdogs[0].every_seconds, "s")
    report.add(HEARTBEATS, "file operations of a heartbeat", operations, "operations")
    report.add(HEARTBEATS, "file operations per second of all ranks", per_second, "operations/s", Basis.SCALED)
    report.limit(
        "heartbeat-traffic",
        per_second,
        most_per_second,
        f"the heartbeats of {world_size:,} ranks make {per_second:,.0f} file operations per second: raise "
        "engine.watchdog.step_seconds, or put run_dir on a faster file system",
    )
    with FileOperations() as counts:
        beats = report.timed(HEARTBEATS, "read the heartbeats of all ranks", watchdogs[0].read_all)
    missing = sum(beat is None for beat in beats)
    report.limit(
        "heartbeats-lost", missing, 0, f"{missing:,} heartbeats cannot be read; please report this as a defect"
    )
    readers = len(watchdogs[0].reporters)
    opened = 2 * readers * sum(counts.values())
    report.add(HEARTBEATS, "ranks that read all heartbeats if the run hangs", readers, "ranks")
    report.add(HEARTBEATS, "files opened if the run hangs", opened, "files", Basis.SCALED)
    report.limit(
        "hang-report-traffic",
        opened / (3 * watchdogs[0].every_seconds),
        most_per_second,
        f"if the run hangs, the ranks open {opened:,} heartbeat files; use fewer ranks",
    )


def rehearse_lock(report: Report, run_dir: Path) -> None:
    """Take the lock of the run folder as rank 0 does, and let a second process try the same."""
    lock = FolderLock(run_dir)
    try:
        refusal = report.timed(LOCK, "take the lock of the run folder", lock.attempt)
        report.limit("lock-refused", float(refusal is not None), 0, f"the lock of a new folder is refused: {refusal}")
        program = "import sys; from pathlib import Path; from mmscale.io.lock import holder_of"
        program += "; sys.exit(holder_of(Path(sys.argv[1])) is None)"
        done = subprocess.run([sys.executable, "-c", program, str(run_dir)], check=False)
        report.add(LOCK, "second process sees the holder", done.returncode == 0)
        report.limit("lock-unseen", float(done.returncode), 0, "a second process does not see the lock's holder")
    finally:
        lock.release()
    # Rank 0 alone holds the lock. Each renewal reads the claim twice, lists the folder, and sets the claim's time.
    report.add(LOCK, "file operations per second of all ranks", 4 / BEAT_SECONDS, "operations/s")


def rehearse_logs(
    report: Report,
    config: RunConfig,
    data: RehearsedData | None,
    folder: Path,
    *,
    num_lanes: int,
    step_seconds: float,
    world_size: int,
    most_bytes_per_day: float,
) -> None:
    """Add the volume of logs per day, from the sizes of real lines and files.

    Args:
        report: Gets the figures and findings.
        config: The run.
        data: Documents and states of rehearsed steps; None leaves out the sample log.
        folder: An empty folder.
        num_lanes: Lanes of the global batch.
        step_seconds: Duration of a step.
        world_size: Number of ranks.
        most_bytes_per_day: Limit of the sum.
    """
    steps = _DAY / step_seconds
    per_day = {name: size * steps for name, size in _log_bytes(config, folder, world_size).items()}
    # A progress line is written each ``plain_line_seconds``, whatever the duration of a step.
    per_day["progress lines of rank 0"] = _PROGRESS_BYTES * _DAY / max(config.metrics.plain_line_seconds, step_seconds)
    report.add(LOGS, "steps per day", steps, "steps/day", Basis.SIMULATED)
    if data is not None:
        sample_log, files = _sample_log_bytes(report, config, data, num_lanes)
        per_day["sample_log"] = sample_log * steps
        report.add(LOGS, "files of the sample log per day", steps * files, "files/day", Basis.SCALED)
    report.add(LOGS, "log files of one start, one for each rank", world_size, "files")
    for name, size in per_day.items():
        report.add(LOGS, f"bytes per day: {name}", int(size), "bytes/day", Basis.SCALED)
    total = sum(per_day.values())
    report.add(LOGS, "bytes per day: all", int(total), "bytes/day", Basis.SCALED)
    report.limit(
        "log-volume",
        total,
        most_bytes_per_day,
        f"the logs grow by {total / 1e9:,.1f} GB a day: set sample_log.losses=false or metrics.tensorboard=false, or "
        "reserve the space",
    )


def _log_bytes(config: RunConfig, folder: Path, world_size: int) -> dict[str, float]:
    """Write steps with the run's own log, and return the bytes per step of each file."""
    components = config.model.components
    phases = ("data", "agreement", "forward", "backward", "optimizer", "communication")
    generator = np.random.default_rng(0)
    log = RunLog(folder, config.metrics, 0, 10**6, Console(file=io.StringIO()))
    names = [dataset.name for dataset in config.data.datasets]
    log.begin_stage(LoggedStage(config.stages[0].name, names, peak_flops=1e18))
    for step in range(1, _LOGGED_STEPS + 1):
        report = StepReport(
            float(generator.uniform(1, 12)),
            1e6 * world_size,
            float(generator.uniform(0, 1)),
            {name: float(generator.uniform(0, 1e-3)) for name in components},
            True,
            component_grad_norms={name: float(generator.uniform(0, 1)) for name in components},
            spans=StepSpans(
                {phase: float(generator.uniform(0, 10)) for phase in phases}, dict.fromkeys(phases, 60 * 10**9)
            ),
        )
        sums = dict.fromkeys(("tokens", "samples", "learned_tokens", "images"), 10_000.0 * world_size)
        sums |= {"cut_documents": 0.0, "model_flops": 1e21, "hardware_flops": 1.3e21}
        for name in names:
            counts = ("loss_sum", "loss_weight", "samples", "tokens", "skipped")
            sums |= {f"dataset/{name}/{count}": 10_000.0 * world_size for count in counts}
        log.step(step, report, sums)
    log.close()
    tensorboard = sum(path.stat().st_size for path in (folder / "tensorboard").rglob("*") if path.is_file())
    sizes = {"metrics.jsonl": (folder / "metrics.jsonl").stat().st_size, "tensorboard": tensorboard}
    return {name: size / _LOGGED_STEPS for name, size in sizes.items()}


def _sample_log_bytes(report: Report, config: RunConfig, data: RehearsedData, num_lanes: int) -> tuple[float, float]:
    """Return bytes and files per step of the sample log, from real segments: one with rows and one without."""
    generator = np.random.default_rng(0)
    rows = [
        (step, lane, *drawn, int(generator.integers(10, 2000)), float(generator.uniform(1, 12)))
        for step, lanes in enumerate(data.packs)
        for lane, documents in sorted(lanes.items())
        for drawn in documents
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    arrays = {name: np.array(column, kind) for column, (name, kind) in zip(columns, COLUMNS.items(), strict=True)}
    none = {name: column[:0] for name, column in arrays.items()}
    last = len(data.packs)
    parts = [LogSegment(1, last, 0, LoaderState.from_json(text), none) for text in data.states]
    merged = report.timed(LOGS, "merge the sample log of all ranks on rank 0", lambda: LogSegment.merge(parts))
    state_bytes = len(merged.to_bytes())
    row_bytes = len(LogSegment(1, last, 0, merged.state, arrays).to_bytes()) - state_bytes
    per_step = row_bytes / last * num_lanes / max(1, len(data.packs[0]))
    report.add(LOGS, "bytes of the loader state in each file of the sample log", state_bytes, "bytes")
    report.add(LOGS, "bytes of the sample log's rows per step", int(per_step), "bytes", Basis.SCALED)
    every = min(config.sample_log.every_steps, config.checkpoint.every_steps or config.sample_log.every_steps)
    return per_step + state_bytes / every, 1 / every
