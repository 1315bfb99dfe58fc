"""Notices that nothing moves any more, says who stands where, and ends the run.

    main thread:  watchdog.enter("forward") ...          where it is, and since when
    watchdog:     RUN/heartbeats/rank-00001              written every second or so, also while the main thread waits
                  own phase longer than its limit? --> read everybody's, name the rank, dump stacks, exit code 76

A rank that stops makes all others wait for it in the next collective, so every rank has its own reason to look. Which
one is to blame shows in the files: one that is not written any more (the process is stopped, or its machine is gone),
or whose main thread waits for no other rank. Where the main thread stands is read off its stack, so no collective need
be wrapped. The files go through the run folder, as checkpoints do, and not through torch's store: that lives in rank 0,
which may be the one that stopped. Seconds are counted by each machine's own clock; no two clocks are compared.

Not for: a rank that dies. Its peers see the connection close and end at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from data_pipeline.io.strict import StrictConfig
from data_pipeline.io.untrusted import append_regular, read_json

EXIT_HUNG = 76
"""Exit code of a run that its watchdog ended."""
HEARTBEATS = "heartbeats"
_VERDICT = "verdict.json"
_MOST_BEAT_BYTES = 1 << 16
_TORCH, _DEEPSPEED = "/torch/distributed/distributed_c10d.py", "/deepspeed/comm/"
_ZERO = "/deepspeed/runtime/zero/partition_parameters.py"
"""Its handles wait for weights that are gathered ahead of time."""
_PHASES = ("start", "data", "agreement", "forward", "backward", "optimizer")
_MEASURES = "/engine/step_clock.py"
"""It stands around every collective and every phase, and is never the place that somebody looks for."""
_OURS = ("/mmscale/", "/data_pipeline/", "/tests/", "/benchmarks/")


class WatchdogConfig(StrictConfig):
    """How long nothing may move before a run counts as hung. Each limit holds for one phase of one step."""

    step_seconds: Annotated[float, Field(gt=0, le=1e9)] | Literal["auto"] | None = "auto"
    """Longest wait for data, forward, backward or the optimizer; null switches the watchdog off. It must be less than
    ``engine.timeout_seconds``, after which a collective fails without telling who was missing; ``auto`` is half."""
    other_seconds: float = Field(default=3600.0, gt=0, le=1e9)
    """The same for what is no step: set-up until the end of the first step, a checkpoint, an evaluation."""

    def limits(self, timeout_seconds: float) -> Limits:
        """In numbers, where a collective may take ``timeout_seconds``."""
        step = timeout_seconds / 2 if self.step_seconds == "auto" else self.step_seconds
        return Limits(step, self.other_seconds)


class Limits(NamedTuple):
    """Seconds; ``step`` None: no watchdog."""

    step: float | None
    other: float


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself.

    Attributes:
        count: Rises with every beat: a rank whose count stands still does not run.
        step: The step it is in.
        phase: ``start``, ``data``, ``agreement``, ``forward``, ``backward``, ``optimizer``, ``checkpoint`` or
            ``evaluation``.
        seconds: For how long.
        collective: Name of the collective that its main thread waits in; empty if it is in none.
        place: Where in our code it is.
    """

    count: int
    step: int
    phase: str
    seconds: float
    collective: str
    place: str


class Watchdog:
    """Watches this rank and, when it does not get on, all others. A daemon thread between ``start`` and ``close``.

    Args:
        run_dir: The run folder, seen by all ranks.
        limits: How long nothing may move.
        rank: This rank.
        world_size: All.
    """

    def __init__(self, run_dir: Path, limits: Limits, rank: int, world_size: int) -> None:
        self._folder, self._logs = run_dir / HEARTBEATS, run_dir / "logs"
        self._limits, self._rank, self._world_size = limits, rank, world_size
        shortest = min(limits.step or limits.other, limits.other)
        self._every = min(5.0, shortest / 8)
        self._main = threading.get_ident()
        self._where, self._step, self._count = ("start", time.monotonic()), 0, 0
        self._warm = False
        self._closed, self._has_spoken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch. Rank 0 clears what an earlier process left; the others' first beats come after theirs."""
        if self._limits.step is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._logs.mkdir(exist_ok=True)
            (self._folder / _VERDICT).unlink(missing_ok=True)
        self._thread.start()

    def close(self) -> None:
        """Stops watching; also if it was never started. Ends the process where the watchdog is about to.

        The main thread comes here with an error if another rank has left a little earlier: the run hung all the same.
        """
        if self._has_spoken.is_set():
            _leave()
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._every)

    @property
    def moment(self) -> tuple[str, int]:
        """The phase and the step that the main thread is in."""
        return self._where[0], self._step

    def enter(self, phase: str) -> None:
        """The main thread begins ``phase``; the one before is over."""
        self._where = (phase, time.monotonic())

    def begin_step(self, step: int) -> None:
        """The main thread begins a step with the wait for its data. The first step is still a part of the start."""
        self._warm, self._step = self._step > 0, step
        self.enter("data")

    def begin_start(self) -> None:
        """The main thread sets up an engine: until the end of its first step everything may take longer."""
        self._warm, self._step = False, 0
        self.enter("start")

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The main thread is in ``phase`` meanwhile, for example ``checkpoint``."""
        self.enter(phase)
        yield
        self.enter("agreement")

    def _limit(self, phase: str) -> float:
        is_step = self._warm and phase in ("data", "forward", "backward", "optimizer", "agreement")
        return (self._limits.step if is_step else None) or self._limits.other

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._every):
            now = time.monotonic()
            if now - before > 3 * self._every:
                # This process was stopped, or starved: nothing of that time is the main thread's fault.
                phase, since = self._where
                self._where = (phase, since + now - before)
            before = now
            beat = self._beat()
            if beat.seconds > self._limit(beat.phase) or (self._folder / _VERDICT).exists():
                self._end(beat)

    def _beat(self) -> Beat:
        """Writes down where this rank stands."""
        self._count += 1
        phase, since = self._where
        collective, place = _stand(sys._current_frames().get(self._main))
        beat = Beat(self._count, self._step, phase, time.monotonic() - since, collective, place)
        with contextlib.suppress(OSError):
            self._write(self._folder / f"rank-{self._rank:05d}", asdict(beat))
        return beat

    def _go_on_beating(self, times: int) -> Beat:
        for _ in range(times):
            self._closed.wait(self._every)
            beat = self._beat()
        return beat

    def _write(self, path: Path, values: object) -> None:
        beside = path.with_name(f".{path.name}.{self._rank}")
        with append_regular(beside) as file:
            file.truncate(0)
            file.write(json.dumps(values).encode())
        beside.replace(path)

    def _end(self, mine: Beat) -> None:
        """Tells what is known and ends the process, unless the main thread goes on meanwhile."""
        first = self._read_all()
        now = self._go_on_beating(3)  # Who does not, meanwhile, does not run.
        if self._closed.is_set() or (now.phase, now.step) != (mine.phase, mine.step) or now.seconds < mine.seconds:
            return
        beats = self._read_all()
        silent = [
            rank for rank, beat in enumerate(beats) if rank != self._rank and (beat is None or beat == first[rank])
        ]
        with contextlib.suppress(OSError):
            self._write(self._folder / _VERDICT, {"rank": self._rank})
        print(f"mmscale: rank {self._rank}: {explain(beats, silent)}", file=sys.stderr, flush=True)
        self._dump_stacks()
        self._has_spoken.set()
        self._go_on_beating(6)  # The others say theirs before our connections close.
        if not self._closed.is_set():
            _leave()

    def _read_all(self) -> list[Beat | None]:
        return [self._read(self._folder / f"rank-{rank:05d}") for rank in range(self._world_size)]

    @staticmethod
    def _read(path: Path) -> Beat | None:
        try:
            return Beat(**read_json(path, most_bytes=_MOST_BEAT_BYTES))
        except (OSError, ValueError, TypeError):
            return None

    def _dump_stacks(self) -> None:
        path = self._logs / f"hang-rank-{self._rank}.txt"
        try:
            with append_regular(path) as file:
                file.truncate(0)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"mmscale: {path}: the stacks cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        else:
            print(f"mmscale: rank {self._rank}: the stacks are in {path}", file=sys.stderr, flush=True)


def _leave() -> None:
    """Ends the process from a thread: the main one cannot be interrupted while it waits in a collective."""
    os._exit(EXIT_HUNG)


def _stand(frame: FrameType | None) -> tuple[str, str]:
    """The collective that a stack waits in, and the innermost line of our own code in it."""
    collective = ""
    while frame is not None:
        path, name = frame.f_code.co_filename.replace(os.sep, "/"), frame.f_code.co_name
        if _ZERO in path and name == "wait":
            collective = "all_gather"
        elif _TORCH in path and name != "wrapper":
            collective = name
        elif _DEEPSPEED in path and name not in ("log_wrapper", "wait"):
            collective = collective or name
        if any(part in path for part in _OURS) and "/site-packages/" not in path and not path.endswith(_MEASURES):
            short = "/".join(path.split("/")[-2:])
            return collective, f"{short}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    return collective, ""


def explain(beats: Sequence[Beat | None], silent: Sequence[int]) -> str:
    """One sentence about a run that hangs: who is waited for, and by whom.

    Args:
        beats: The last word of each rank; None if it never said any.
        silent: Ranks whose process does not run.
    """
    known = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
    blamed = list(silent) or [rank for rank, beat in known.items() if not beat.collective]
    if not blamed or len(blamed) == len(beats):
        # All wait for others, or none seems to (a device's queue shows no collective): who is furthest behind?
        behind = min(_progress(beat) for beat in known.values())
        blamed = [rank for rank, beat in known.items() if _progress(beat) == behind]
    waiting = [rank for rank in known if rank not in blamed]
    sentence = "; ".join(_describe(rank, known.get(rank), rank in silent) for rank in blamed)
    if not waiting:
        return sentence
    places = sorted({f"{known[rank].collective or known[rank].phase} of step {known[rank].step}" for rank in waiting})
    ranks = f"rank{'s' * (len(waiting) > 1)} {', '.join(map(str, waiting))} wait{'s' * (len(waiting) == 1)}"
    phases = sorted({known[rank].phase for rank in waiting})
    return f"{sentence} while {ranks} for it in {' and '.join(places)} ({', '.join(phases)})"


def _describe(rank: int, beat: Beat | None, is_silent: bool) -> str:
    if beat is None:
        return f"rank {rank} has never given a sign of life"
    where = f"{beat.phase} of step {beat.step}" if beat.step else beat.phase
    if is_silent:
        return (
            f"rank {rank} does not run any more (stopped, swapped out, or its machine is gone): it was last in {where}"
        )
    waits = f", in {beat.collective}" if beat.collective else ""
    return f"rank {rank} has been in {where} for {beat.seconds:.0f} s{waits} (at {beat.place or 'no line of ours'})"


def _progress(beat: Beat) -> tuple[int, int]:
    return beat.step, _PHASES.index(beat.phase) if beat.phase in _PHASES else len(_PHASES)
