"""Goodput: the share of a run's wall time, over all its starts, that advanced training.

    metrics.jsonl   steps: seconds, and the part that waited for data
    goodput.jsonl   all other time: set-up, checkpoints, evaluation, lost steps, time between starts

``goodput.jsonl`` is only appended to. Each start reads both files. It then records the time since the previous start's
last entry, and the lost steps: those after the checkpoint, whose lines are cut from ``metrics.jsonl``. The time from a
process's last entry to the next start counts as ``down``, since nothing records when in between the process died.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.io.atomic import append_whole
from data_pipeline.io.retry import explain_io
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_lines
from mmscale.errors import MMScaleError
from mmscale.metrics.metrics_file import read_metrics

GOODPUT_FILE = "goodput.jsonl"
_MOST_LINE_BYTES = 1 << 16

Spent = Literal["setup", "checkpoint", "evaluation", "other"]
"""Work between steps. ``setup`` is from the start of a process until it waits for a batch, and between stages."""
_STARTED, _REPEATED, _DOWN = "started", "repeated", "down"


@dataclass(frozen=True)
class Goodput:
    """Wall time in seconds from the beginning of the first start to the last entry, by use.

    Attributes:
        share: ``training / wall``.
        wall: Total time: the sum of the following values up to ``other``.
        training: Time of steps, without waiting for data. Lost steps are not included.
        data: Time waiting for data in these steps.
        repeated: Time of lost steps: those after the last checkpoint of a start that was killed.
        setup: From the start of a process until it waits for its first batch, and between stages.
        checkpoint: Time in which the step loop waited for a checkpoint.
        evaluation: Scoring and captions.
        down: Time from the last entry of one start to the beginning of the next.
        other: The remaining time.
        starts: Number of starts.
    """

    share: float
    wall: float
    training: float
    data: float
    repeated: float
    setup: float
    checkpoint: float
    evaluation: float
    down: float
    other: float
    starts: int

    def to_json(self) -> dict[str, float | int]:
        """Return the values by name."""
        return asdict(self)


def read_goodput(run_dir: Path) -> Goodput | None:
    """Return the wall time of a run so far; None if ``goodput.jsonl`` has no start."""
    return _sum_up(read_metrics(run_dir / "metrics.jsonl"), _read(run_dir / GOODPUT_FILE))


class WallTime:
    """Record the wall time of a running run. Rank 0 only.

    Create it before ``metrics.jsonl`` is cut back: it reads the lines of the lost steps.

    Args:
        run_dir: The run folder.
        start_step: Finished steps. Later steps in ``metrics.jsonl`` are lost.
        now: Unix time; replaced in tests.
        began: Unix time at which this process started; None asks the system.

    Raises:
        MMScaleError: ``goodput.jsonl`` cannot be written, or a file cannot be read.
    """

    def __init__(
        self, run_dir: Path, start_step: int, now: Callable[[], float] = time.time, began: float | None = None
    ) -> None:
        self._path = run_dir / GOODPUT_FILE
        self._now = now
        records, entries = read_metrics(run_dir / "metrics.jsonl"), _read(self._path)
        seen = _last_time(records, entries)
        # A second run within one process starts at the last entry of the first.
        self._since = max(_process_start() if began is None else began, seen or 0.0)
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")  # End an incomplete last line of a killed process.
        if seen is not None:
            self._record(_DOWN, self._since - seen, start_step, at=self._since)
        self._record(_STARTED, 0.0, start_step, at=self._since)
        # If an earlier start was killed before it cut metrics.jsonl, it has already recorded these lost steps.
        recorded = max((entry["time"] for entry in entries if entry["kind"] == _REPEATED), default=0.0)
        lost = [r for r in records if r["step"] > start_step and r.get("time", 0.0) > recorded]
        if lost:
            self._record(_REPEATED, sum(r["seconds"] for r in lost), start_step, at=self._since)
        entries = _read(self._path)
        self._first = min(entry["time"] - entry["seconds"] for entry in entries if entry["kind"] == _STARTED)
        self._training = _training_seconds([r for r in records if r["step"] <= start_step and "time" in r])

    def record_pause(self, kind: Spent, step: int) -> float:
        """Record the time since the last step or call as ``kind``. Return its seconds."""
        now = self._now()
        seconds, self._since = now - self._since, now
        self._record(kind, seconds, step, at=now)
        return seconds

    def step(self, seconds: float, data_wait_seconds: float) -> dict[str, float]:
        """Add a step that ends now. Return ``time`` and ``goodput`` so far, for its line in ``metrics.jsonl``."""
        self._since = self._now()
        self._training += seconds - data_wait_seconds
        wall = self._since - self._first
        return {"time": self._since, "goodput": self._training / wall if wall > 0 else 0.0}

    def _record(self, kind: str, seconds: float, step: int, *, at: float) -> None:
        self._append(json.dumps({"time": at, "kind": kind, "seconds": max(0.0, seconds), "step": step}) + "\n")

    def _append(self, text: str) -> None:
        try:
            append_whole(self._path, text.encode())
        except OSError as error:
            raise MMScaleError(f"goodput cannot be recorded: {self._path}: {explain_io(error)}") from error


def _process_start() -> float:
    """Return the Unix time at which this process began; without ``/proc`` the current time.

    Source: proc(5), field 22, in clock ticks since boot.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - max(0.0, age)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the valid entries. Incomplete or damaged lines are left out."""
    entries: list[dict[str, Any]] = []
    if not path.is_file():
        return entries
    try:
        for line in read_lines(path, most_bytes=_MOST_LINE_BYTES):
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                entry = parse_json(line)
                at, seconds = float(entry["time"]), float(entry["seconds"])
                if math.isfinite(at) and math.isfinite(seconds):
                    entries.append({"time": at, "kind": str(entry["kind"]), "seconds": seconds})
    except UntrustedError as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise MMScaleError(f"{path}: cannot be read: {error.strerror}") from error
    return entries


def _training_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(record["seconds"]) - float(record["data_wait_seconds"]) for record in records)


def _last_time(records: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time of the last entry or step; None without entries."""
    times = [record["time"] for record in records if "time" in record] + [entry["time"] for entry in entries]
    return max(times) if entries else None


def _sum_up(records: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> Goodput | None:
    last = _last_time(records, entries)
    starts = [entry["time"] for entry in entries if entry["kind"] == _STARTED]
    if last is None or not starts:
        return None
    spent: Counter[str] = Counter()
    for entry in entries:
        spent[entry["kind"]] += entry["seconds"]
    counted = [record for record in records if "time" in record]
    training = _training_seconds(counted)
    data = sum(float(record["data_wait_seconds"]) for record in counted)
    named = {kind: spent[kind] for kind in ("repeated", "setup", "checkpoint", "evaluation", "down")}
    wall = last - min(starts)
    other = max(0.0, wall - training - data - sum(named.values()))
    return Goodput(training / wall if wall > 0 else 0.0, wall, training, data, **named, other=other, starts=len(starts))
