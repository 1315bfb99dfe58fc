"""The doctor on every rank: the checks of each machine and device, then those between ranks.

rank --machine, kernels--> lines --all-reduce, clocks--> lines --JSON--> rank 0: merged lines
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as torch_dist

from mmscale.dist import World, gather_bytes, gather_numbers, init_distributed, shutdown
from mmscale.doctor.kernels import kernels
from mmscale.doctor.lines import Line, merge, read_lines
from mmscale.doctor.machine import attention, devices, limits, packages, storage

_REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_ROUNDS = 5
_SLOW_BYTES_PER_SECOND = 1e9
"""Bus bandwidth of NCCL below which the ranks probably talk over Ethernet: ten gigabits."""
_SKEW_SECONDS = 1.0
"""The time of files and logs of several ranks is compared, with seconds as its unit."""
_MOST_SKEW_SECONDS = 300.0
"""Object stores refuse requests whose time differs by more than some minutes."""


@dataclass(frozen=True)
class Settings:
    """How the ranks join: ``device`` as ``engine.device``, and seconds until a missing rank counts as lost."""

    device: str
    timeout_seconds: float


def examine(settings: Settings, folder: Path) -> list[Line] | None:
    """Run all checks. All ranks must call.

    Returns:
        The lines of all ranks on rank 0, None on the others.

    Raises:
        LaunchError, UnsupportedError: as ``init_distributed``.
        EngineError: another rank is lost or did not answer in time.
    """
    world = init_distributed(settings)
    try:
        lines = list(_own_lines(world, folder))
        lines += [*_clocks(world), *_all_reduce(world)]
        sent = json.dumps([asdict(line) for line in lines]).encode()
        received = gather_bytes(world, sent)
        return merge([read_lines(each) for each in received]) if world.is_main else None
    finally:
        shutdown(world)


def _own_lines(world: World, folder: Path) -> Iterator[Line]:
    if world.local_rank == 0:
        yield from packages()
        yield from devices()
        yield from attention()
        yield from limits(world.world_size)
        yield from storage(folder, world.rank)
    yield from kernels(world.device)


def _clocks(world: World) -> Iterator[Line]:
    if world.world_size == 1:
        return
    gather_numbers(world, 0.0)  # After it, all ranks read their clocks within one message of each other.
    times = gather_numbers(world, time.time())
    skew = max(times) - min(times)
    if not world.is_main:
        return
    found = f"{world.world_size} ranks, {skew:.3f} s apart"
    if skew < _SKEW_SECONDS:
        yield Line("clocks", "ok", found)
        return
    middle = statistics.median(times)
    worst = max(range(len(times)), key=lambda rank: abs(times[rank] - middle))
    remedy = f"start chrony or ntpd on the machine of rank {worst}"
    yield Line("clocks", "failure" if skew > _MOST_SKEW_SECONDS else "warning", found, remedy)


def _all_reduce(world: World) -> Iterator[Line]:
    """Check the sum over all ranks, and measure the bandwidth of each rank's link."""
    if world.world_size == 1:
        return
    kind = world.device.type
    numbers = _REDUCED_BYTES[kind] // 4
    values = torch.empty(numbers, device=world.device)
    seconds = []
    for _ in range(_ROUNDS):
        values.fill_(world.rank + 1)
        gather_numbers(world, 0.0)
        start = time.perf_counter()
        torch_dist.all_reduce(values)
        total = float(values[-1])  # Waits for the device.
        seconds.append(time.perf_counter() - start)
    expected = world.world_size * (world.world_size + 1) / 2
    is_right = total == expected and bool((values == expected).all())
    slowest = max(gather_numbers(world, statistics.median(seconds)))
    wrong = [rank for rank, right in enumerate(gather_numbers(world, float(is_right))) if not right]
    if not world.is_main:
        return
    speed = 2 * (world.world_size - 1) / world.world_size * 4 * numbers / slowest
    found = f"{torch_dist.get_backend()}, {speed / 1e9:.2f} GB/s a rank for {4 * numbers >> 20} MiB"
    if wrong:
        remedy = "replace these machines or their cables; NCCL_DEBUG=INFO names the links"
        yield Line("all-reduce", "failure", f"wrong sums on ranks {', '.join(map(str, wrong[:8]))}", remedy)
    elif kind == "cuda" and speed < _SLOW_BYTES_PER_SECOND:
        remedy = "NCCL_DEBUG=INFO shows the network; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it"
        yield Line("all-reduce", "warning", found, remedy)
    else:
        yield Line("all-reduce", "ok", found)
