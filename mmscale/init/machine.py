"""The memory and processors that a run on this machine can use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """One machine.

    Attributes:
        device: ``cuda`` or ``cpu``.
        name: The device in a few words.
        ranks: Number of processes to start: one for each GPU, else 1.
        memory_bytes: Free memory of the device of one rank.
        cores: Processors that this process may use.
    """

    device: str
    name: str
    ranks: int
    memory_bytes: int
    cores: int

    @property
    def torch_device(self) -> torch.device:
        """The device of the first rank."""
        return torch.device(self.device)


def find_machine() -> Machine:
    """Return this machine. GPUs are used if torch finds any."""
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        free = min(torch.cuda.mem_get_info(number)[0] for number in range(count))
        return Machine("cuda", f"{count} x {torch.cuda.get_device_name(0)}", count, free, cores)
    return Machine("cpu", f"{cores} CPU cores", 1, free_host_memory(), cores)


def free_host_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Return the bytes that this machine, or the container of this process, has free.

    Args:
        meminfo: Linux's list of memory counters.
        cgroup: Folder of the process's control group, version 2 or 1.
    """
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((cgroup / limit).read_text()) - int((cgroup / usage).read_text()))
        except (OSError, ValueError):  # No such group, or "max": no limit.
            continue
    return max(0, free)
