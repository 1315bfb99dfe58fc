"""High-water marks of memory: of the process since it began, and of a stretch of work.

The kernel and the CUDA allocator keep one mark each. Measuring a stretch resets them, so what they showed before is
remembered here.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PeakMemory:
    """High-water marks of this process. ``device_bytes`` is None without an accelerator."""

    rss_bytes: int
    device_bytes: int | None


_before_reset = {"rss": 0, "device": 0}
"""Largest marks that a reset has wiped out. The marks belong to the process, and so does this."""


def peak_memory() -> PeakMemory:
    """The most memory this process has held since it started."""
    _remember()
    return PeakMemory(_before_reset["rss"], _before_reset["device"] if torch.cuda.is_available() else None)


def reset_peak(device: torch.device) -> bool:
    """Starts the mark of ``device`` again from what is held now; False where the system has no such thing."""
    _remember()
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


def _remember() -> None:
    _before_reset["rss"] = max(_before_reset["rss"], _rss_mark())
    if torch.cuda.is_available():
        _before_reset["device"] = max(_before_reset["device"], torch.cuda.max_memory_allocated())


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
