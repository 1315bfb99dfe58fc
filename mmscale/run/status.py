"""Read the state of a run from its folder, for ``mmscale launch status``. Nothing is written.

    lock/ heartbeats/ starts/ metrics.jsonl checkpoints/ result.json      files of the run
    waiting and running jobs of the folder                                given by the caller, who asked SLURM

A process is known to run if the kernel of this machine holds its lock, or if it renews its files while this module
watches them. Clocks of two machines are compared nowhere: if other machines wrote the files, ages are relative to the
newest of these files.
"""

from __future__ import annotations

import os
import re
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data_pipeline.io.untrusted import UntrustedError, open_regular, parse_json, read_yaml
from mmscale.engine.watchdog import (
    BEAT_SECONDS,
    HEARTBEATS,
    Heartbeat,
    beat_seconds,
    explain,
    has_verdict,
    heartbeat_path,
    read_heartbeat,
)
from mmscale.errors import LaunchError
from mmscale.io.lock import HeldLock, describe_holder, held_lock
from mmscale.report.starts import read_starts
from mmscale.run.outcome import read_outcome

State = Literal["running", "queued", "finished", "stopped", "failed", "hung", "never started"]
WATCH_SECONDS = 12.0
"""Longest time to watch files. A living holder renews its claim every 2 s, a living rank its heartbeat every 5 s.
Thousands of ranks write less often (``watchdog.beat_seconds``), and are watched for longer."""
SLOW_FACTOR = 1.3
"""A rank is slow if its own time of a step is this many times the median of the ranks, or more."""
_SUSPICIOUS_BEATS = 3
_MOST_NAMED = 8
_POLL_SECONDS = 0.5
_TAIL_BYTES = 256 << 10
_RATE_STEPS = 50
_CHECKPOINT = re.compile(r"step-([0-9]{8,})")


class Job(Protocol):
    """A job of the run folder in SLURM's queue."""

    @property
    def number(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...

    @property
    def is_pending(self) -> bool: ...


@dataclass(frozen=True)
class RankStatus:
    """The newest heartbeat of a rank.

    Attributes:
        rank: Number of the rank.
        step: Step of the run; 0 during set-up.
        phase: ``start``, ``data``, ``forward``, ...
        phase_seconds: Time in this phase, by the clock of the rank.
        collective: Collective that the rank waits in; empty for none.
        age_seconds: Age of the file; see ``RunStatus.ages``.
        node: Machine of the rank; empty if the file does not contain it.
        own_seconds: Time of a step that does not depend on other ranks, see ``watchdog.Heartbeat``; None if unknown.
    """

    rank: int
    step: int
    phase: str
    phase_seconds: float
    collective: str
    age_seconds: float
    node: str
    own_seconds: float | None


@dataclass(frozen=True)
class SlowNode:
    """A machine with ranks that need more time for a step than the others.

    Attributes:
        node: Name of the machine.
        ranks: The slow ranks.
        num_ranks: All ranks of the machine that recorded a time.
        factor: Mean time of the slow ranks, divided by the median of all ranks.
    """

    node: str
    ranks: tuple[int, ...]
    num_ranks: int
    factor: float

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.ranks[:_MOST_NAMED])) + (", ..." if len(self.ranks) > _MOST_NAMED else "")
        return f"node {self.node}: rank{'s' * (len(self.ranks) > 1)} {numbers}, {self.factor:.1f} times the median"


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    Attributes:
        state: One word.
        reason: One sentence about the state.
        holder: Process that holds the folder; None if it is free.
        step: Last step in ``metrics.jsonl``; None before the first one.
        total_steps: Steps of the whole run; None before the first start.
        seconds_per_step: Mean over the last 50 steps, with the time that saving took; None before the first step.
        seconds_left: Time for the remaining steps at this speed; None if it is unknown or the run is finished.
        checkpoint_step: Step of the newest complete checkpoint; None without one.
        checkpoint_age_seconds: Age of its manifest.
        restarts: Starts after the first one.
        world_size: Ranks of the newest start; None before the first one.
        ages: The clock of the ages: ``this machine``, or ``newest file of the run``.
        ranks: Heartbeats by rank.
        slow_nodes: Machines with slow ranks, the slowest first; empty unless the run is running.
    """

    state: State
    reason: str
    holder: str | None
    step: int | None
    total_steps: int | None
    seconds_per_step: float | None
    seconds_left: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    restarts: int
    world_size: int | None
    ages: Literal["this machine", "newest file of the run"]
    ranks: tuple[RankStatus, ...]
    slow_nodes: tuple[SlowNode, ...]


@dataclass(frozen=True)
class _Seen:
    """The files that a living run renews, as read once."""

    lock: HeldLock | None
    beats: dict[int, tuple[Heartbeat, float]]

    def age(self, modified: float, is_local: bool) -> float:
        newest = [modified for _, modified in self.beats.values()]
        newest += [self.lock.claim[1] / 1e9] if self.lock is not None else []
        now = time.time() if is_local or not newest else max(newest)
        return max(0.0, now - modified)


def read_status(run_dir: Path, jobs: Sequence[Job] = (), *, watch_seconds: float = WATCH_SECONDS) -> RunStatus:
    """Return the state of a run.

    Args:
        run_dir: The run folder.
        jobs: Jobs of this folder in SLURM's queue.
        watch_seconds: Longest time to wait for evidence that processes live. A healthy run on this machine needs none.

    Raises:
        LaunchError: there is no such folder.
    """
    if not run_dir.is_dir():
        raise LaunchError(f"{run_dir}: no such run folder")
    starts = read_starts(run_dir)
    world_size = starts[-1].world_size if starts else None
    seen = _look(run_dir, world_size)
    is_local = seen.lock.is_here if seen.lock is not None else bool(starts) and starts[-1].host == socket.gethostname()
    lives, silent, seen = _watch(run_dir, world_size, seen, is_local, watch_seconds)
    metrics = _last_metrics(run_dir / "metrics.jsonl")
    step = metrics[-1]["step"] if metrics else None
    total = _total_steps(run_dir / "config.yaml")
    state, reason = _state(run_dir, seen, jobs, lives, silent, (step, total))
    rate = _seconds_per_step(metrics)
    left = None if state == "finished" or None in (step, total, rate) else max(0, total - step) * rate  # type: ignore[operator]
    checkpoint = _newest_checkpoint(run_dir / "checkpoints")
    return RunStatus(
        state=state,
        reason=reason,
        holder=None if seen.lock is None else describe_holder(seen.lock.holder),
        step=step,
        total_steps=total,
        seconds_per_step=rate,
        seconds_left=left,
        checkpoint_step=None if checkpoint is None else checkpoint[0],
        checkpoint_age_seconds=None if checkpoint is None else seen.age(checkpoint[1], is_local),
        restarts=max(0, len(starts) - 1),
        world_size=world_size,
        ages="this machine" if is_local else "newest file of the run",
        ranks=tuple(
            RankStatus(
                *(rank, beat.step, beat.phase, beat.seconds, beat.collective, seen.age(modified, is_local)),
                *(beat.node, beat.own_seconds),
            )
            for rank, (beat, modified) in sorted(seen.beats.items())
        ),
        slow_nodes=slow_nodes({rank: beat for rank, (beat, _) in seen.beats.items()}) if state == "running" else (),
    )


def slow_nodes(beats: Mapping[int, Heartbeat]) -> tuple[SlowNode, ...]:
    """Return the machines with ranks that are slower than the median of all ranks by ``SLOW_FACTOR``.

    The lower median is used: with two ranks, the slower one is compared with the faster one.

    Args:
        beats: The newest heartbeat of each rank. Ranks without a recorded time are left out.
    """
    own = {rank: beat.own_seconds for rank, beat in sorted(beats.items()) if beat.own_seconds}
    if len(own) < 2:
        return ()
    median = statistics.median_low(own.values())
    slow = defaultdict(list)
    for rank, seconds in own.items():
        if seconds >= SLOW_FACTOR * median:
            slow[beats[rank].node].append(rank)
    found = [
        SlowNode(
            node,
            tuple(ranks),
            sum(beats[rank].node == node for rank in own),
            statistics.fmean(own[rank] for rank in ranks) / median,
        )
        for node, ranks in slow.items()
    ]
    return tuple(sorted(found, key=lambda each: -each.factor))


def _look(run_dir: Path, world_size: int | None) -> _Seen:
    beats = {}
    ranks = range(world_size) if world_size is not None else _ranks_with_files(run_dir)
    for rank in ranks:
        path = heartbeat_path(run_dir, rank)
        try:
            modified = path.stat().st_mtime
        except OSError:
            continue
        if (beat := read_heartbeat(path)) is not None:
            beats[rank] = (beat, modified)
    return _Seen(held_lock(run_dir), beats)


def _ranks_with_files(run_dir: Path) -> list[int]:
    try:
        names = os.listdir(run_dir / HEARTBEATS)
    except OSError:
        return []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"rank-\d{5,7}", name))


def _watch(
    run_dir: Path, world_size: int | None, first: _Seen, is_local: bool, seconds: float
) -> tuple[bool, list[int], _Seen]:
    """Return whether the holder lives, the ranks whose heartbeats do not change, and the newest files."""
    if first.lock is None:
        return False, [], first
    lives = first.lock.is_here
    every = beat_seconds(world_size or len(first.beats))
    waiting = {
        rank for rank, (_, modified) in first.beats.items() if first.age(modified, is_local) > _SUSPICIOUS_BEATS * every
    }
    seen, deadline = first, time.monotonic() + seconds * every / BEAT_SECONDS
    while (waiting or not lives) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        seen = _look(run_dir, world_size)
        if seen.lock is None:
            return False, [], seen
        lives = lives or seen.lock.claim != first.lock.claim
        waiting = {rank for rank in waiting if rank not in seen.beats or seen.beats[rank][0] == first.beats[rank][0]}
    return lives, sorted(waiting), seen


def _state(
    run_dir: Path,
    seen: _Seen,
    jobs: Sequence[Job],
    lives: bool,
    silent: Sequence[int],
    progress: tuple[int | None, int | None],
) -> tuple[State, str]:
    outcome = read_outcome(run_dir)
    running = [job for job in jobs if not job.is_pending]
    beats = [seen.beats[rank][0] if rank in seen.beats else None for rank in range(max(seen.beats, default=-1) + 1)]
    if lives and (silent or has_verdict(run_dir)):
        return "hung", explain(beats, silent) if any(beats) else "the watchdog reported that no rank makes progress"
    if lives:
        return "running", "a process holds the folder and its ranks renew their heartbeats"
    if seen.lock is not None and running:
        return "hung", f"job {running[0].number} runs, but its rank 0 does not renew its lock"
    if running:
        return "running", f"job {running[0].number} is {running[0].state}; rank 0 has not taken the run folder yet"
    if outcome is not None and outcome.outcome == "finished":
        return "finished", "every step is done and the report is written"
    if jobs:
        job = jobs[0]
        return "queued", f"job {job.number} is {job.state}" + (f" ({job.reason})" if job.reason else "")
    if seen.lock is not None:
        return "failed", "the holder of the folder does not renew its lock: it was killed, or its machine failed"
    if outcome is not None and outcome.outcome == "stopped":
        return "stopped", f"saved and stopped ({outcome.message}); the same command resumes the run"
    if outcome is not None:
        return "failed", outcome.message
    if has_verdict(run_dir):
        return "hung", "the watchdog ended the run; RUN/logs/hang-rank-*.txt has the stacks"
    if (run_dir / "result.json").is_file() and progress[0] is not None and progress[0] >= (progress[1] or 0):
        return "finished", "every step is done and the report is written"
    if (run_dir / "starts").is_dir() or (run_dir / "lock").is_dir():
        return "failed", "the last start ended without a record: it was killed, or its machine failed"
    return "never started", "no rank has taken the run folder"


def _last_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the last valid lines of ``metrics.jsonl``, at most ``_RATE_STEPS``, without reading the whole file."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines(keepends=True)[size > _TAIL_BYTES :]
    except OSError:
        return []
    records = []
    for line in lines[-_RATE_STEPS:]:
        try:
            record = parse_json(line) if line.endswith(b"\n") else None
        except UntrustedError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0:
            records.append(record)
    return records


def _seconds_per_step(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean time of a step, with saving, without evaluation and set-up."""
    times = [
        sum(record.get(key, 0.0) for key in ("seconds", "checkpoint_seconds"))
        for record in records
        if all(isinstance(record.get(key, 0.0), int | float) for key in ("seconds", "checkpoint_seconds"))
        and "seconds" in record
    ]
    return sum(times) / len(times) if times else None


def _total_steps(path: Path) -> int | None:
    """Return the steps of the configuration of the newest start, as ``RunConfig.total_steps``, without its checks."""
    try:
        values = read_yaml(path)
        steps = sum(stage["steps"] for stage in values["stages"])
        most = values.get("max_steps")
        return int(steps if most is None else min(steps, most))
    except (OSError, UntrustedError, KeyError, TypeError, AttributeError, ValueError):
        return None


def _newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Return step and modification time of the complete checkpoint with the largest step."""
    try:
        steps = sorted((int(match[1]), name) for name in os.listdir(folder) if (match := _CHECKPOINT.fullmatch(name)))
    except OSError:
        return None
    for step, name in reversed(steps):
        try:
            return step, (folder / name / "manifest.json").stat().st_mtime
        except OSError:
            continue
    return None
