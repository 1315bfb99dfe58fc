"""Goodput: the share of a run's wall time, over all its starts, that advanced training.

    metrics.jsonl   steps that stand: seconds, of them waiting for data
    goodput.jsonl   everything else: set-up, checkpoints, evaluation, steps that a kill made vain, time between starts

The second file only grows. A start reads both, notes what the last one left (steps behind the checkpoint, which
``metrics.jsonl`` is about to forget, and the time until this start), and goes on. Time between a process's last sign of
life and its successor's start counts as ``down``: nobody is there to tell death from the moments before it.
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

from data_pipeline.io.untrusted import UntrustedError, append_regular, parse_json, read_lines
from mmscale.errors import MMScaleError
from mmscale.metrics.metrics_file import read_metrics

GOODPUT_FILE = "goodput.jsonl"
_MOST_LINE_BYTES = 1 << 16

Spent = Literal["setup", "checkpoint", "evaluation", "other"]
"""What a process does between steps. ``setup`` is from its start to its first batch, and between stages."""
_STARTED, _REPEATED, _DOWN = "started", "repeated", "down"


@dataclass(frozen=True)
class Goodput:
    """Wall time in seconds from the beginning of the first start to the last sign of life.

    Attributes:
        share: ``training / wall``: what advanced training, of all.
        wall: All of it; the sum of what follows.
        training: Steps that stand, without their waiting for data.
        data: Waiting for data in these steps.
        repeated: Steps that a kill made vain: done, lost, and done again.
        setup: From the start of a process to its first batch, and between stages.
        checkpoint: While the step loop stood still for one.
        evaluation: Scoring and captions.
        down: Between two starts.
        other: The rest.
        starts: How often the run was started.
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
        """The plain mapping."""
        return asdict(self)


def read_goodput(run_dir: Path) -> Goodput | None:
    """The account of a run folder so far; None if it has none (an older run, or no start got that far)."""
    return _account(read_metrics(run_dir / "metrics.jsonl"), _read(run_dir / GOODPUT_FILE))


class WallTime:
    """The account of a run while it goes on. Rank 0 only.

    Args:
        run_dir: The run folder.
        start_step: Steps done; lines of later ones in ``metrics.jsonl`` are about to be cut back.
        now: Unix time; replaced in tests.
        began: When this process started, unix time; by default the system is asked.

    Raises:
        MMScaleError: the disk refuses.
    """

    def __init__(
        self, run_dir: Path, start_step: int, now: Callable[[], float] = time.time, began: float | None = None
    ) -> None:
        self._path = run_dir / GOODPUT_FILE
        self._now = now
        records, notes = read_metrics(run_dir / "metrics.jsonl"), _read(self._path)
        seen = _last_sign(records, notes)
        # A second run within one process starts where the first was last seen.
        self._since = max(_process_start() if began is None else began, seen or 0.0)
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")  # A kill tore the last line; ours must not become its end.
        if seen is not None:
            self._note(_DOWN, self._since - seen, start_step, at=self._since)
        self._note(_STARTED, 0.0, start_step, at=self._since)
        # What an earlier start noted as repeated may still stand there, if it was killed before the cut.
        noted = max((note["time"] for note in notes if note["kind"] == _REPEATED), default=0.0)
        vain = [r for r in records if r["step"] > start_step and r.get("time", 0.0) > noted]
        if vain:
            self._note(_REPEATED, sum(r["seconds"] for r in vain), start_step, at=self._since)
        notes = _read(self._path)
        self._first = min(note["time"] - note["seconds"] for note in notes if note["kind"] == _STARTED)
        self._training = _training_seconds([r for r in records if r["step"] <= start_step and "time" in r])

    def spent(self, kind: Spent, step: int) -> float:
        """Notes that the time since the last step, or since the last call, went into ``kind``; returns it."""
        now = self._now()
        seconds, self._since = now - self._since, now
        self._note(kind, seconds, step, at=now)
        return seconds

    def step(self, seconds: float, data_wait_seconds: float) -> dict[str, float]:
        """Takes in a step that has ended now; returns ``time`` and ``goodput`` so far, for its line."""
        self._since = self._now()
        self._training += seconds - data_wait_seconds
        wall = self._since - self._first
        return {"time": self._since, "goodput": self._training / wall if wall > 0 else 0.0}

    def _note(self, kind: str, seconds: float, step: int, *, at: float) -> None:
        self._append(json.dumps({"time": at, "kind": kind, "seconds": max(0.0, seconds), "step": step}) + "\n")

    def _append(self, text: str) -> None:
        try:
            with append_regular(self._path) as file:
                file.write(text.encode())
        except OSError as error:
            raise MMScaleError(f"the account of time cannot be written: {self._path}: {error.strerror}") from error


def _process_start() -> float:
    """Unix time at which this process began; where there is no ``/proc``, now. proc(5): field 22, in clock ticks."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - max(0.0, age)


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines; what a kill tore is left out."""
    notes: list[dict[str, Any]] = []
    if not path.is_file():
        return notes
    try:
        for line in read_lines(path, most_bytes=_MOST_LINE_BYTES):
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                note = parse_json(line)
                at, seconds = float(note["time"]), float(note["seconds"])
                if math.isfinite(at) and math.isfinite(seconds):
                    notes.append({"time": at, "kind": str(note["kind"]), "seconds": seconds})
    except UntrustedError as error:
        raise MMScaleError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise MMScaleError(f"{path}: cannot be read: {error.strerror}") from error
    return notes


def _training_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(record["seconds"]) - float(record["data_wait_seconds"]) for record in records)


def _last_sign(records: Sequence[Mapping[str, Any]], notes: Sequence[Mapping[str, Any]]) -> float | None:
    times = [record["time"] for record in records if "time" in record] + [note["time"] for note in notes]
    return max(times) if notes else None


def _account(records: Sequence[Mapping[str, Any]], notes: Sequence[Mapping[str, Any]]) -> Goodput | None:
    last = _last_sign(records, notes)
    starts = [note["time"] for note in notes if note["kind"] == _STARTED]
    if last is None or not starts:
        return None
    spent: Counter[str] = Counter()
    for note in notes:
        spent[note["kind"]] += note["seconds"]
    counted = [record for record in records if "time" in record]
    training = _training_seconds(counted)
    data = sum(float(record["data_wait_seconds"]) for record in counted)
    named = {kind: spent[kind] for kind in ("repeated", "setup", "checkpoint", "evaluation", "down")}
    wall = last - min(starts)
    other = max(0.0, wall - training - data - sum(named.values()))
    return Goodput(training / wall if wall > 0 else 0.0, wall, training, data, **named, other=other, starts=len(starts))
