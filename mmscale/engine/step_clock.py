"""Where the time of a step goes, and how much memory each part of it needs.

    with clock.phase("forward"): ...      with clock.communicating(): ...      clock.pop_spans() -> StepSpans

Phases follow one another. Communication runs inside them (ZeRO gathers weights in hooks of forward and backward), so it
is no phase of its own but a share *of which*. On a CPU a span is wall time. On CUDA it is the time between two events
on the compute stream: a collective counts with what the stream waits for it, a hidden one with nothing, and nothing
here makes the host wait for the device.

The kernel and the CUDA allocator keep one high-water mark of memory each. Measuring a phase resets them, so
``peak_memory`` remembers what they showed before.
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
"""What a step does outside of phases: words between ranks."""
COMMUNICATION = "communication"

_COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced"),
    *("all_to_all_single", "all_to_all", "gather", "scatter", "barrier"),
)
"""Methods of DeepSpeed's communication backend that move data between ranks."""


@dataclass(frozen=True)
class StepSpans:
    """What one step took on this rank.

    Attributes:
        seconds: By phase, and under ``communication`` the part of all phases that was spent in or waiting for
            collectives.
        peak_bytes: By phase the most memory held during it: of the device on CUDA, else of the process. Empty where
            it was not asked for, or the system cannot tell.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PeakMemory:
    """High-water marks of this process. ``device_bytes`` is None without an accelerator."""

    rss_bytes: int
    device_bytes: int | None


class StepClock:
    """Measures the phases of steps.

    Args:
        device: Where the step runs.
        now: Seconds, monotonic; replaced in tests.

    Attributes:
        memory: Whether to take the memory marks of phases too; at first not. It resets the process's own mark, which
            ``peak_memory`` makes up for and others may not, and costs 0.2 ms a phase on a CPU.
        on_phase: Told the name of each phase as it is entered, and ``BETWEEN`` as it is left.
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
        """Counts the enclosed work under ``name``, here and as a range in a trace."""
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
        """Counts the enclosed work as communication; inside another such block it counts once."""
        if self._inside_collective:
            yield
            return
        self._inside_collective = True
        try:
            with self._span(COMMUNICATION):
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
        """Return the spans since the last call. On CUDA call it once the step's metrics have reached the host."""
        if self._events:
            self._events[-1][2].synchronize()  # It has passed already: the metrics came after it in the stream.
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1e3
        self._events.clear()
        spans = StepSpans(dict(self._seconds), dict(self._peaks))
        self._seconds.clear()
        self._peaks.clear()
        return spans


_running: list[StepClock] = []
"""Clocks inside a phase: at most one, unless phases are nested."""


def watch_deepspeed() -> None:
    """Lets collectives of DeepSpeed, and waits for those it starts early, count for the clock whose phase they are in.

    Its own log of communication waits for the device after every call, which would change what it measures. So the
    methods of its backend object are shadowed, once a process, by attributes of the same names.
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
    """A handle of a collective that was started; waiting for it is communication."""

    def __init__(self, work: Any, clock: StepClock) -> None:
        self._work = work
        self._clock = clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.communicating():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


_before_reset = {"rss": 0, "device": 0}
"""Largest marks that a reset has wiped out. The marks belong to the process, and so does this."""


def peak_memory() -> PeakMemory:
    """The most memory this process has held since it started."""
    marks = _before_reset
    marks["rss"] = max(marks["rss"], _rss_mark())
    if not torch.cuda.is_available():
        return PeakMemory(marks["rss"], None)
    marks["device"] = max(marks["device"], torch.cuda.max_memory_allocated())
    return PeakMemory(marks["rss"], marks["device"])


def reset_peak(device: torch.device) -> bool:
    """Starts the mark of ``device`` again from what is held now; False where the system has no such thing."""
    peak_memory()  # Remembers the marks.
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
    """The most that was held since ``reset_peak``: of the device on CUDA, else of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _rss_mark()


def _rss_mark() -> int:
    """Peak resident set size in bytes. Not getrusage on Linux: a child starts there with its parent's mark."""
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes.
