"""Run a function of a test module on real gloo ranks, one process each, and return all results.

The function takes ``(world, **arguments)`` and returns a JSON value. After ``timeout`` the ranks are killed, and the
test fails with their output.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from mmscale.dist import World, all_reduce_sum_list
from tests.engine.fork_server import Child, fork_server

ROOT = Path(__file__).resolve().parents[2]
_PORTS = itertools.count(random.SystemRandom().randrange(10_000, 19_000))
"""Ports that the system does not choose itself, as it does from 32768 on: until a rank listens at its port, a socket of
another test could get such a one. Each test process begins elsewhere."""


def barrier(world: World) -> None:
    """Wait for all ranks, at most ``world.timeout_seconds``. All ranks must call."""
    all_reduce_sum_list(world, [0.0])


def free_port() -> int:
    """Return a port at which nobody listens, another one at each call."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(
    function: str, world_size: int, arguments: dict[str, Any], folder: Path, environment: dict[str, str] | None = None
) -> list[Child]:
    """Start ``package.module:function`` on ``world_size`` ranks, with results in ``folder/result-R.json``."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **(environment or {}),
        }
        words = [function, arguments, str(folder / f"result-{rank}.json")]
        processes.append(fork_server(rank % 2).fork("tests.engine.ranks:serve", words, env, folder / f"log-{rank}.txt"))
    return processes


def run_ranks(
    function: str,
    world_size: int,
    arguments: dict[str, Any] | None = None,
    *,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Return the results in rank order (None for a rank without one). Raise AssertionError if a rank fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = start_ranks(function, world_size, arguments or {}, folder, environment)
        try:
            codes = [process.wait(timeout) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
        if any(codes):
            logs = "\n".join(f"--- rank {r}\n{(folder / f'log-{r}.txt').read_text()}" for r in range(world_size))
            raise AssertionError(f"exit codes {codes}\n{logs[-6000:]}")
        files = [folder / f"result-{rank}.json" for rank in range(world_size)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


def serve(function: str, arguments: dict[str, Any], result: str) -> None:
    """Run the function on one rank, in its own process."""
    from mmscale.cli.console import exit_process
    from mmscale.dist import init_distributed, shutdown
    from mmscale.engine.config import EngineConfig

    module, _, name = function.partition(":")
    world = init_distributed(EngineConfig(timeout_seconds=60, device="cpu"))
    answer = getattr(importlib.import_module(module), name)(world, **arguments)
    Path(result).write_text(json.dumps(answer))
    shutdown(world)
    exit_process(0)
