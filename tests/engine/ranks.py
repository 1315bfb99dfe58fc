"""Runs a function of a test module on real gloo ranks, each its own interpreter, and gives back what each one printed.

A function takes ``(world, **arguments)`` and returns something JSON can hold. Ranks that outlive ``timeout`` are killed
and the test fails with what they wrote.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    function: str, world_size: int, arguments: dict[str, Any], folder: Path, environment: dict[str, str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """Starts ``package.module:function`` on ``world_size`` ranks; results appear as ``folder/result-R.json``."""
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
        command = [sys.executable, __file__, function, json.dumps(arguments), str(folder / f"result-{rank}.json")]
        with (folder / f"log-{rank}.txt").open("wb") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT))
    return processes


def run_ranks(
    function: str,
    world_size: int,
    arguments: dict[str, Any] | None = None,
    *,
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Results of all ranks, by rank (None of one that left early); AssertionError with the logs if one fails."""
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


def _main() -> None:
    import importlib

    from mmscale.cli.console import leave
    from mmscale.dist import init_distributed, shutdown
    from mmscale.engine.config import EngineConfig

    function, arguments, result = sys.argv[1:]
    module, _, name = function.partition(":")
    world = init_distributed(EngineConfig(timeout_seconds=60, device="cpu"))
    answer = getattr(importlib.import_module(module), name)(world, **json.loads(arguments))
    Path(result).write_text(json.dumps(answer))
    shutdown(world)
    leave(0)


if __name__ == "__main__":
    _main()
