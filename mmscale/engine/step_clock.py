"""Time and peak memory of the phases of a step.

    with clock.phase("forward"): ...      with clock.communicating(): ...      clock.pop_spans() -> StepSpans

Phases follow one another. Communication happens inside phases (ZeRO gathers weights in hooks of forward and backward)
and between them, so its time is measured separately and is not a phase. On a CPU a span is wall time. On CUDA it is the
time between two events on the compute stream: a collective counts only while that stream waits for it. The clock never
makes the host wait for the device.

The kernel and the CUDA allocator keep one high-water mark of memory each. Measuring a phase resets them, so
``peak_memory`` keeps the largest value from before.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import record_function

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
BETWEEN = "agreement"
"""The phase name for the work outside of the three phases: small collectives between ranks."""
COMMUNICATION = "communication"
_OUTSIDE = "communication between phases"

_COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced"),
    *("all_to_all_single", "all_to_all", "gather", "scatter", "barrier"),
)
"""Methods of DeepSpeed's communication backend that move data between ranks."""


@dataclass(frozen=True)
class StepSpans:
    """Time and memory of one step on this rank.

    Attributes:
        seconds: Seconds by phase. ``communication`` is the time in collectives or waiting for them, inside phases and
            between them.
        peak_bytes: Peak memory by phase: of the device on CUDA, else of the process. Empty if it was not requested or
            the system cannot measure it.
        own_seconds: Seconds in phases without communication: the time that does not depend on other ranks.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    own_seconds: float = 0.0


@dataclass(frozen=True)
class PeakMemory:
    """High-water marks of this process. ``device_bytes`` is None without an accelerator."""

    rss_bytes: int
    device_bytes: int | None


class StepClock:
    """Measures the phases of steps.

    Args:
        device: Where the step runs.
        now: Monotonic clock in seconds; replaced in tests.

    Attributes:
        memory: Whether to measure the peak memory of phases too; False at first. Each measurement resets the high-water
            mark of the process, which other tools may read, and costs 0.2 ms a phase on a CPU.
        on_phase: Called with the name of each phase when it begins, and with ``BETWEEN`` when it ends without an
            error.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.memory = False
        self.on_phase: Callable[[str], None] = lambda name: None
        self._device = device
        self._now = now
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._peaks: defaultdict[str, int] = defaultdict(int)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._inside_collective = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the enclosed work as phase ``name``, which is also a range in a profiler trace."""
        measured = self.memory and reset_peak(self._device)
        self.on_phase(name)
        _running.append(self)
        try:
            with record_function(name), self._span(name):
                yield
        finally:
            _running.pop()
        self.on_phase(BETWEEN)
        if measured:
            self._peaks[name] = max(self._peaks[name], peak_since_reset(self._device))

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Measure the enclosed work as communication. A nested block is counted once."""
        if self._inside_collective:
            yield
            return
        self._inside_collective = True
        try:
            with self._span(COMMUNICATION if self in _running else _OUTSIDE):
                yield
        finally:
            self._inside_collective = False

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - begin

    def pop_spans(self) -> StepSpans:
        """Return the spans since the last call. On CUDA call it after the step's metrics have reached the host."""
        if self._events:
            self._events[-1][2].synchronize()  # Returns at once: the metrics followed this event in the stream.
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1e3
        self._events.clear()
        seconds = dict(self._seconds)
        outside, inside = seconds.pop(_OUTSIDE, None), seconds.get(COMMUNICATION, 0.0)
        own = sum(value for name, value in seconds.items() if name != COMMUNICATION) - inside
        if outside is not None:
            seconds[COMMUNICATION] = inside + outside
        spans = StepSpans(seconds, dict(self._peaks), max(0.0, own))
        self._seconds.clear()
        self._peaks.clear()
        return spans


_running: list[StepClock] = []
"""Clocks of the active phases, the innermost last. Collectives count for the last one."""


def watch_deepspeed() -> None:
    """Measure DeepSpeed's collectives, and the waits for asynchronous ones, in the clock of the active phase.

    DeepSpeed's own communication log waits for the device after every call, which would change the measurement. So
    attributes of the same names shadow the methods of DeepSpeed's backend object. A second call does nothing.
    """
    from deepspeed.comm import comm

    backend = comm.cdb
    if getattr(backend, "watched_by_mmscale", False):
        return
    for name in _COLLECTIVES:
        if hasattr(backend, name):
            setattr(backend, name, _TimedCollective(getattr(backend, name)))
    backend.watched_by_mmscale = True


@dataclass(frozen=True)
class _TimedCollective:
    """A collective whose calls inside a phase count as communication."""

    collective: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _running:
            return self.collective(*args, **kwargs)
        clock = _running[-1]
        with clock.communicating():
            work = self.collective(*args, **kwargs)
        return _TimedWork(work, clock) if hasattr(work, "wait") else work


class _TimedWork:
    """The handle of an asynchronous collective. Waiting for it counts as communication."""

    def __init__(self, work: Any, clock: StepClock) -> None:
        self._work = work
        self._clock = clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.communicating():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


_before_reset = {"rss": 0, "device": 0}
"""Largest high-water marks of this process before their resets, in bytes."""


def peak_memory() -> PeakMemory:
    """Return the peak memory of this process since it started."""
    marks = _before_reset
    marks["rss"] = max(marks["rss"], _rss_mark())
    if not torch.cuda.is_available():
        return PeakMemory(marks["rss"], None)
    marks["device"] = max(marks["device"], torch.cuda.max_memory_allocated())
    return PeakMemory(marks["rss"], marks["device"])


def reset_peak(device: torch.device) -> bool:
    """Reset the high-water mark of ``device`` to the memory held now. Return False if the system cannot do that."""
    peak_memory()  # Saves the marks before the reset.
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        # proc(5): 5 resets the peak resident set size. Linux only, and some containers mount /proc read-only.
        with open("/proc/self/clear_refs", "wb") as file:
            file.write(b"5")
    except OSError:
        return False
    return True


def peak_since_reset(device: torch.device) -> int:
    """Return the peak memory since ``reset_peak``: of the device on CUDA, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _rss_mark()


def _rss_mark() -> int:
    """Return the peak resident set size in bytes.

    On Linux getrusage is only the fallback: there a child process starts with its parent's mark.
    """
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes.
