"""Child processes of the rendezvous rehearsal; each prints one line of JSON.

    python -m mmscale.rehearse.store_program serve RANKS         rank 0: serves torch's store, then joins as rank 0
    python -m mmscale.rehearse.store_program join PORT RANKS FIRST COUNT    COUNT ranks, one thread and socket each
    python -m mmscale.rehearse.store_program groups RANKS...     gloo's own exchange of addresses, for a few ranks

The first two run ``mmscale.dist.check_device_types`` for every rank, as a start does.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from mmscale.dist import check_device_types, configure_gloo

_HOST = "127.0.0.1"
_TIMEOUT = timedelta(seconds=120)
_STACK_BYTES = 256 << 10


def raise_descriptor_limit() -> int:
    """Raise the limit of open files of this process to the hard limit, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def serve(world_size: int) -> dict[str, Any]:
    """Serve the store as rank 0 until all ranks have joined and compared device types."""
    listener = socket.create_server((_HOST, 0), backlog=socket.SOMAXCONN)
    port = listener.getsockname()[1]
    print(port, flush=True)
    sys.stdin.readline()  # The other processes have imported torch.
    before, began, cpu = _io_bytes(), time.perf_counter(), time.process_time()
    store = torch_dist.TCPStore(_HOST, port, world_size, True, _TIMEOUT, master_listen_fd=listener.detach())
    joined = time.perf_counter() - began
    descriptors = len(os.listdir("/proc/self/fd"))  # Each rank is connected until rank 0 has given the verdict.
    check_device_types(store, 0, world_size, "cpu")
    found = {
        "joined_seconds": joined,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "descriptors": descriptors,
        "received_bytes": _io_bytes()["rchar"] - before["rchar"],
        "sent_bytes": _io_bytes()["wchar"] - before["wchar"],
    }
    print(json.dumps(found), flush=True)
    sys.stdin.readline()  # The ranks still read the verdict.
    return {}


def join(port: int, world_size: int, first: int, count: int) -> dict[str, Any]:
    """Join as the ranks from ``first`` on, and compare device types."""
    threading.stack_size(_STACK_BYTES)
    stores: list[torch_dist.TCPStore] = []
    errors: list[str] = []

    def work(rank: int) -> None:
        try:
            stores.append(store := torch_dist.TCPStore(_HOST, port, world_size, False, _TIMEOUT))
            check_device_types(store, rank, world_size, "cpu")
        except Exception as error:
            errors.append(f"rank {rank}: {error}")

    print("ready", flush=True)
    sys.stdin.readline()
    _run_threads([lambda rank=rank: work(rank) for rank in range(first, first + count)])  # type: ignore[misc]
    return {"joined": len(stores), "errors": errors[:3]}


class CountingStore(torch_dist.Store):
    """A store that counts the calls that another store answers, and their bytes."""

    def __init__(self, inner: torch_dist.Store) -> None:
        super().__init__()
        self._inner = inner
        self.calls = self.bytes = 0

    def _count(self, num_bytes: int = 0) -> None:
        self.calls += 1
        self.bytes += num_bytes

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._count(len(value))
        self._inner.set(key, value)  # type: ignore[arg-type]  # The stub knows only texts.

    def get(self, key: str) -> bytes:
        value = self._inner.get(key)
        self._count(len(value))
        return value

    def wait(self, keys: list[str], timeout: timedelta = _TIMEOUT) -> None:
        self._count()
        self._inner.wait(keys, timeout)

    def has_extended_api(self) -> bool:
        return False


def groups(worlds: Sequence[int], large: int) -> dict[str, Any]:
    """Create a gloo group of each size as ranks of a run of ``large`` ranks would, and make one all-reduce.

    Returns:
        For each size the calls and bytes of the store, and the open files of one rank.
    """
    import torch

    configure_gloo(large)
    found: dict[str, Any] = {}
    for world_size in worlds:
        before = len(os.listdir("/proc/self/fd"))
        inner = torch_dist.HashStore()
        stores = [CountingStore(inner) for _ in range(world_size)]
        made: dict[int, Any] = {}

        def work(rank: int, world: int = world_size, made: dict[int, Any] = made, stores: Any = stores) -> None:
            made[rank] = torch_dist.ProcessGroupGloo(stores[rank], rank, world, _TIMEOUT)
            values = torch.ones(1)
            made[rank].allreduce([values]).wait()
            assert values.item() == world

        _run_threads([lambda rank=rank, work=work: work(rank) for rank in range(world_size)])  # type: ignore[misc]
        found[str(world_size)] = {
            "calls": sum(store.calls for store in stores),
            "bytes": sum(store.bytes for store in stores),
            "descriptors": (len(os.listdir("/proc/self/fd")) - before) / world_size,
        }
        made.clear()
    return found


def _run_threads(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _io_bytes() -> dict[str, int]:
    """Return the bytes that this process has read and written by system calls (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def main(words: Sequence[str]) -> None:
    """Run one of the programs."""
    raise_descriptor_limit()
    numbers = [int(word) for word in words[1:]]
    if words[0] == "serve":
        serve(*numbers)
    elif words[0] == "join":
        print(json.dumps(join(*numbers)), flush=True)
    else:
        print(json.dumps(groups(numbers[1:], numbers[0])), flush=True)
    os._exit(0)  # Closing thousands of stores one by one takes seconds.


if __name__ == "__main__":
    main(sys.argv[1:])
