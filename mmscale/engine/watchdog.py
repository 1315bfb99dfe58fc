"""Detect a run that hangs, name the rank that causes it, and end the run.

    main thread:      watchdog.enter("forward")      records the phase and its start
    watchdog thread:  RUN/heartbeats/rank-00001      written every 5 s or more often, also while the main thread waits
                      phase longer than its limit?   read all heartbeats, name the rank, dump stacks, exit with code 76

From 2,000 ranks on, a rank writes less often, so that all ranks together write 400 heartbeats per second. At most 16
ranks read all heartbeats and write the verdict; the others read the verdict. Otherwise 8,000 hung ranks would open 128
million files.

If one rank hangs, all others wait for it in the next collective, so every rank exceeds its limit. The heartbeats show
the cause: a rank whose file is no longer updated (the process is stopped, or its machine is down), or a rank whose main
thread waits in no collective. The watchdog reads the collective from the stack of the main thread, so no collective
needs a wrapper. Heartbeats are files in the run folder. torch's store would not do: rank 0 serves it, and rank 0 may be
the rank that hangs. Each rank measures seconds by its own clock; clocks of two machines are never compared.

Not for: a rank that dies. The other ranks then see the connection close and end at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from data_pipeline.io.strict import StrictConfig
from data_pipeline.io.untrusted import append_regular, parse_json, read_bytes

EXIT_HUNG = 76
"""Exit code of a run that its watchdog ended."""
HEARTBEATS = "heartbeats"
_VERDICT = "verdict.json"
"""Written by each rank that reports the hang. The other ranks then report it too, unless they make progress. The batch
script of a SLURM job reads the nodes of the ranks that do not run."""
_MOST_BEAT_BYTES = 1 << 16
BEAT_SECONDS = 5.0
"""Longest time between two heartbeats of a rank, up to 2,000 ranks."""
_BEATS_PER_SECOND = 400
"""Most heartbeats that all ranks together write per second; each takes four operations of the shared file system."""
_MOST_REPORTERS = 16
RECENT_STEPS = 16
"""Steps over which ``Heartbeat.own_seconds`` is the median, so that one slow read of data does not count."""
_MOST_NAMED = 8
"""Most ranks, or ranges of ranks, that a message lists."""
_TORCH, _DEEPSPEED = "/torch/distributed/distributed_c10d.py", "/deepspeed/comm/"
_ZERO = "/deepspeed/runtime/zero/partition_parameters.py"
"""The file with the handles that wait for prefetched weights."""
_PHASES = ("start", "data", "agreement", "forward", "backward", "optimizer")
_MEASURES = "/engine/step_clock.py"
"""A file of ours that wraps every collective and phase. Its lines are not reported as a location."""
_OURS = ("/mmscale/", "/data_pipeline/", "/tests/", "/benchmarks/")


class WatchdogConfig(StrictConfig):
    """The time limits after which a run counts as hung. Each limit holds for one phase at a time."""

    step_seconds: Annotated[float, Field(gt=0, le=1e9)] | Literal["auto"] | None = "auto"
    """Longest time in seconds for a phase of a step: wait for data, forward, backward, optimizer, or the small
    collectives between them. It must be less than ``engine.timeout_seconds``, after which a collective fails without
    naming the missing rank. ``auto``: half of ``engine.timeout_seconds``; null: no watchdog."""
    other_seconds: float = Field(default=3600.0, gt=0, le=1e9)
    """Longest time in seconds for any other phase: a set-up, each phase of the first step after it, a checkpoint, an
    evaluation; above 0."""

    def limits(self, timeout_seconds: float) -> Limits:
        """Return the limits in seconds. ``timeout_seconds`` is the timeout of a collective."""
        step = timeout_seconds / 2 if self.step_seconds == "auto" else self.step_seconds
        return Limits(step, self.other_seconds)


class Limits(NamedTuple):
    """Limits of a phase in seconds, inside steps and elsewhere. ``step`` None: no watchdog."""

    step: float | None
    other: float


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, as written to its heartbeat file.

    Attributes:
        count: Number of the heartbeat. If it does not increase, the rank's process does not run.
        step: Current step; 0 during set-up.
        phase: ``start``, ``data``, ``agreement``, ``forward``, ``backward``, ``optimizer``, ``checkpoint`` or
            ``evaluation``.
        seconds: Seconds in this phase.
        collective: Name of the collective that the main thread waits in; empty for none.
        place: File, line and function of the innermost frame in the code of this project; empty for none.
        node: Name of the rank's machine in SLURM, else its host name.
        own_seconds: Time of a step that does not depend on other ranks: the wait for data, and the phases without
            communication. Median of the last ``RECENT_STEPS`` steps; None before the second step.
    """

    count: int
    step: int
    phase: str
    seconds: float
    collective: str
    place: str
    node: str = ""
    own_seconds: float | None = None


def beat_seconds(world_size: int) -> float:
    """Return the longest time between two heartbeats of a rank."""
    return max(BEAT_SECONDS, world_size / _BEATS_PER_SECOND)


class Watchdog:
    """The watchdog of this rank. A daemon thread runs between ``start`` and ``close``.

    If a phase exceeds its limit, the thread reads the heartbeats of all ranks, prints the cause and ends the process.

    Args:
        run_dir: The run folder, on a file system that all ranks share.
        limits: Time limits of the phases.
        rank: This rank.
        world_size: Number of ranks.

    Attributes:
        every_seconds: Time between two heartbeats.
        reporters: The ranks that read all heartbeats if the run hangs.
    """

    def __init__(self, run_dir: Path, limits: Limits, rank: int, world_size: int) -> None:
        self._folder, self._logs = run_dir / HEARTBEATS, run_dir / "logs"
        self._limits, self._rank, self._world_size = limits, rank, world_size
        shortest = min(limits.step or limits.other, limits.other)
        self.every_seconds = min(beat_seconds(world_size), shortest / 8)
        self.reporters = range(0, world_size, -(-world_size // _MOST_REPORTERS))
        self._main = threading.get_ident()
        self._where, self._step, self._count = ("start", time.monotonic()), 0, 0
        self._warm = False
        self._own_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._data_seconds = 0.0
        self._closed, self._reported = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread, unless the watchdog is off. Remove the verdict of an earlier process first."""
        if self._limits.step is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._logs.mkdir(exist_ok=True)
            (self._folder / _VERDICT).unlink(missing_ok=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, if it was started. If the watchdog has reported a hang, end the process with exit code 76.

        When another rank exits first, the main thread gets an error and calls this method. The run has still hung.
        """
        if self._reported.is_set():
            _exit_process()
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2 * self.every_seconds)

    @property
    def current_phase(self) -> tuple[str, int]:
        """The current phase of the main thread, and its step."""
        return self._where[0], self._step

    def enter(self, phase: str) -> None:
        """Record that the main thread begins ``phase``."""
        self._where = (phase, time.monotonic())

    def begin_step(self, step: int) -> None:
        """Record that the main thread begins a step and waits for its data.

        In the first step after ``begin_start``, ``other_seconds`` limits each phase.
        """
        self._warm, self._step = self._step > 0, step
        self.enter("data")

    def begin_start(self) -> None:
        """Record that the main thread sets up an engine. ``other_seconds`` limits each phase until the second step."""
        self._warm, self._step = False, 0
        self._own_seconds.clear()
        self.enter("start")

    def end_data(self) -> None:
        """Record that the data of the step have arrived."""
        self._data_seconds = time.monotonic() - self._where[1]

    def end_step(self, own_seconds: float) -> None:
        """Record the end of a step on this rank.

        The first step after ``begin_start`` is left out: it allocates memory and compiles kernels.

        Args:
            own_seconds: ``StepSpans.own_seconds`` of the step.
        """
        if self._warm:
            self._own_seconds.append(self._data_seconds + own_seconds)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Record that the main thread is in ``phase`` during the enclosed work, for example ``checkpoint``."""
        self.enter(phase)
        yield
        self.enter("agreement")

    def _limit(self, phase: str) -> float:
        is_step = self._warm and phase in ("data", "forward", "backward", "optimizer", "agreement")
        return (self._limits.step if is_step else None) or self._limits.other

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self.every_seconds):
            now = time.monotonic()
            if now - before > 3 * self.every_seconds:
                # The whole process was stopped or got no CPU time. Do not count that time for the main thread.
                phase, since = self._where
                self._where = (phase, since + now - before)
            before = now
            beat = self.beat()
            if beat.seconds > self._limit(beat.phase) or (self._folder / _VERDICT).exists():
                self._end(beat)

    def beat(self) -> Heartbeat:
        """Write the heartbeat file and return its content. A file that cannot be written is ignored."""
        self._count += 1
        phase, since = self._where
        collective, place = _innermost_call(sys._current_frames().get(self._main))
        recent = self._own_seconds.copy()  # One call, which the main thread cannot interrupt.
        own = statistics.median(recent) if recent else None
        beat = Heartbeat(self._count, self._step, phase, time.monotonic() - since, collective, place, _node(), own)
        with contextlib.suppress(OSError):
            self._write(heartbeat_path(self._folder.parent, self._rank), asdict(beat))
        return beat

    def _repeat_beat(self, times: int) -> Heartbeat:
        """Write ``times`` more heartbeats at the usual interval and return the last one."""
        for _ in range(times):
            self._closed.wait(self.every_seconds)
            beat = self.beat()
        return beat

    def _write(self, path: Path, values: object) -> None:
        temporary = path.with_name(f".{path.name}.{self._rank}")
        with append_regular(temporary) as file:
            file.truncate(0)
            file.write(json.dumps(values).encode())
        temporary.replace(path)

    def _end(self, mine: Heartbeat) -> None:
        """Report the hang and end the process, unless the main thread makes progress in the meantime."""
        first = self.read_all() if self._rank in self.reporters else None
        now = self._repeat_beat(3)  # A rank whose heartbeat does not change in this time does not run.
        if self._closed.is_set() or (now.phase, now.step) != (mine.phase, mine.step) or now.seconds < mine.seconds:
            return
        message = self._explain(first) if first is not None else self._wait_for_verdict()
        print(f"mmscale: rank {self._rank}: {message}", file=sys.stderr, flush=True)
        self._dump_stacks()
        self._reported.set()
        self._repeat_beat(6)  # Let the other ranks report before this rank's connections close.
        if not self._closed.is_set():
            _exit_process()

    def _explain(self, first: Sequence[Heartbeat | None]) -> str:
        """Compare all heartbeats with those of some heartbeats ago, write the verdict, and return its message."""
        beats = self.read_all()
        silent = [
            rank for rank, beat in enumerate(beats) if rank != self._rank and (beat is None or beat == first[rank])
        ]
        message = explain(beats, silent)
        verdict = self._folder / _VERDICT
        with contextlib.suppress(OSError):
            if not verdict.exists():  # To a rank that runs again after the others have ended, they are silent.
                nodes = sorted({beat.node for rank in silent if (beat := beats[rank]) is not None})
                self._write(verdict, {"rank": self._rank, "message": message, "silent_nodes": nodes})
        return message

    def _wait_for_verdict(self) -> str:
        """Return the message of a rank of ``reporters``, or that there is none."""
        for _ in range(4):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                return str(parse_json(read_bytes(self._folder / _VERDICT, most_bytes=_MOST_BEAT_BYTES))["message"])
            self._repeat_beat(1)
        return "this rank hangs, and no other rank has named the cause; the stacks of all ranks show more"

    def read_all(self) -> list[Heartbeat | None]:
        """Read the heartbeat file of each rank; None for a file that is missing or damaged."""
        return [read_heartbeat(heartbeat_path(self._folder.parent, rank)) for rank in range(self._world_size)]

    def _dump_stacks(self) -> None:
        """Write the place of the main thread, then the stacks of all threads, of which the main thread is the last."""
        path = self._logs / f"hang-rank-{self._rank}.txt"
        phase, step = self.current_phase
        collective, place = _innermost_call(sys._current_frames().get(self._main))
        try:
            with append_regular(path) as file:
                file.truncate(0)
                waits = f"in {collective}" if collective else "in no collective"
                file.write(f"main thread: {phase} of step {step}, {waits}, at {place}\n\n".encode())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"mmscale: {path}: the stacks cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        else:
            print(f"mmscale: rank {self._rank}: the stacks are in {path}", file=sys.stderr, flush=True)


_HEARTBEAT = TypeAdapter(Heartbeat)


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank."""
    return run_dir / HEARTBEATS / f"rank-{rank:05d}"


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Return the content of a heartbeat file; None if it is missing or damaged."""
    try:
        return _HEARTBEAT.validate_json(read_bytes(path, most_bytes=_MOST_BEAT_BYTES), strict=True)
    except (OSError, ValueError):
        return None


def has_verdict(run_dir: Path) -> bool:
    """Return whether the watchdog of a rank reported that the newest start hangs."""
    return (run_dir / HEARTBEATS / _VERDICT).exists()


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _exit_process() -> None:
    """End the process from any thread. The main thread cannot be interrupted while it waits in a collective."""
    os._exit(EXIT_HUNG)


def _innermost_call(frame: FrameType | None) -> tuple[str, str]:
    """Return the collective that a stack waits in, and the innermost location in the code of this project."""
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


def explain(beats: Sequence[Heartbeat | None], silent: Sequence[int]) -> str:
    """Return a sentence about a run that hangs: the ranks that cause it, and the ranks that wait for them.

    Args:
        beats: The last heartbeat of each rank; None if there is none that can be read.
        silent: Ranks whose process does not run.
    """
    known = {rank: beat for rank, beat in enumerate(beats) if beat is not None}
    blamed = list(silent) or [rank for rank, beat in known.items() if not beat.collective]
    if not blamed or len(blamed) == len(beats):
        # All ranks or none wait in a collective (one queued on a device is not on the stack). Name the ranks with the
        # least progress.
        least = min(_progress(beat) for beat in known.values())
        blamed = [rank for rank, beat in known.items() if _progress(beat) == least]
    waiting = [rank for rank in known if rank not in blamed]
    sentence = "; ".join(_describe(rank, known.get(rank), rank in silent) for rank in blamed[:_MOST_NAMED])
    if len(blamed) > _MOST_NAMED:
        sentence += f"; and {len(blamed) - _MOST_NAMED:,} more ranks ({_ranges(blamed)})"
    if not waiting:
        return sentence
    places = sorted({f"{known[rank].collective or known[rank].phase} of step {known[rank].step}" for rank in waiting})
    if len(places) > _MOST_NAMED:
        places = [*places[:_MOST_NAMED], f"{len(places) - _MOST_NAMED} more places"]
    ranks = f"rank{'s' * (len(waiting) > 1)} {_ranges(waiting)} wait{'s' * (len(waiting) == 1)}"
    phases = sorted({known[rank].phase for rank in waiting})
    return f"{sentence} while {ranks} for it in {' and '.join(places)} ({', '.join(phases)})"


def _ranges(ranks: Sequence[int]) -> str:
    """Return ascending ranks as text: one by one if there are few, else as ranges, of which the first are listed."""
    if len(ranks) <= _MOST_NAMED:
        return ", ".join(map(str, ranks))
    starts = [rank for rank, before in zip(ranks, [-2, *ranks], strict=False) if rank != before + 1]
    ends = [rank for rank, after in zip(ranks, [*ranks[1:], -2], strict=True) if after != rank + 1]
    listed = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(listed[:_MOST_NAMED]) + (", ..." if len(listed) > _MOST_NAMED else "")


def _describe(rank: int, beat: Heartbeat | None, is_silent: bool) -> str:
    if beat is None:
        return f"rank {rank} has never written a heartbeat"
    where = f"{beat.phase} of step {beat.step}" if beat.step else beat.phase
    if is_silent:
        return (
            f"rank {rank} does not run any more (stopped, swapped out, or its machine is gone): it was last in {where}"
        )
    waits = f", in {beat.collective}" if beat.collective else ""
    return f"rank {rank} has been in {where} for {beat.seconds:.0f} s{waits} (at {beat.place or 'no line of mmscale'})"


def _progress(beat: Heartbeat) -> tuple[int, int]:
    return beat.step, _PHASES.index(beat.phase) if beat.phase in _PHASES else len(_PHASES)
