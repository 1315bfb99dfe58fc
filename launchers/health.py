"""Check the nodes of a SLURM job before training, and choose those to train on. The batch script runs it.

    srun, one task a node:  python -m launchers.health node FOLDER ...    -->  FOLDER/NODE.json
    batch script:           python -m launchers.health choose FOLDER ...  <--  all files

``choose`` prints one line, ``NODES FAILING``: the nodes to train on and the failing nodes, each a list with commas and
``-`` for none. It prints one line to stderr for each failing node. A node fails if

* it has written no file when the step ends: it is down, or it hangs, for example in an all-reduce;
* bytes that it wrote to the run folder read back differently, or cannot be written;
* another process uses a large part of the memory of a GPU, or its memory is nearly full;
* an all-reduce over its GPUs returns a wrong sum;
* its clock is behind that of the first node, or far ahead;
* its slowest device multiplies matrices at less than half the median speed of the nodes.

Not for faults that appear under load after minutes, and not for the network between nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import read_json

SLOW = 0.5
"""A node fails if its matmul speed is below this share of the median of all nodes."""
FREE_SHARE = 0.8
"""Share of a GPU's memory that must be free."""
FREE_HOST_BYTES = 1 << 30
BEHIND_SECONDS = 5.0
"""A clock may be this far behind the first node's. The step starts after the first node has read its clock."""
AHEAD_SECONDS = 300.0
"""A clock may be this far ahead. It includes the time in which ``srun`` starts the step and Python imports torch."""
_STORAGE_BYTES = 16 << 20
_MATMUL_SECONDS = 0.5
_MOST_PROBLEM_LETTERS = 500


@dataclass(frozen=True)
class NodeHealth:
    """The check of one node, as written to its file.

    Attributes:
        node: Name of the node in SLURM.
        problems: One sentence for each failed check.
        matmul_flops: Floating-point operations per second of a matrix product, of the slowest device.
        free_bytes: Free memory of each GPU; of the host without GPUs.
        storage_bytes_per_second: Speed of one write and read in the run folder. No threshold uses it.
        clock_seconds: Clock of the node minus that of the first node at the start of the step.
    """

    node: str
    problems: tuple[str, ...]
    matmul_flops: float
    free_bytes: tuple[int, ...]
    storage_bytes_per_second: float
    clock_seconds: float

    @classmethod
    def from_json(cls, value: Any) -> NodeHealth:
        """Return the content of a file. Raises ValueError, KeyError or TypeError if it is damaged."""
        speed = float(value["matmul_flops"])
        if not math.isfinite(speed):
            raise ValueError("matmul_flops is not finite")
        problems = tuple(str(each)[:_MOST_PROBLEM_LETTERS] for each in value["problems"])
        rest = (float(value["storage_bytes_per_second"]), float(value["clock_seconds"]))
        return cls(str(value["node"]), problems, speed, tuple(int(each) for each in value["free_bytes"]), *rest)


def failing_nodes(nodes: Sequence[str], reports: Mapping[str, NodeHealth]) -> dict[str, str]:
    """Return the reason of each failing node, in the order of ``nodes``.

    Args:
        nodes: All nodes of the job.
        reports: The checks by node. A node without one did not answer in time.
    """
    speeds = [report.matmul_flops for node in nodes if (report := reports.get(node)) is not None]
    median = statistics.median_high(speeds) if speeds else 0.0  # With two nodes, the faster one.
    failing = {}
    for node in nodes:
        report = reports.get(node)
        if report is None:
            failing[node] = "did not answer in time"
        elif report.problems:
            failing[node] = "; ".join(report.problems)
        elif report.matmul_flops < SLOW * median:
            failing[node] = (
                f"its slowest device multiplies matrices at {report.matmul_flops / median:.0%} of the median speed"
            )
    return failing


def clock_problem(seconds: float) -> str | None:
    """Return a sentence if the clock of a node differs too much from that of the first node."""
    if -BEHIND_SECONDS <= seconds <= AHEAD_SECONDS:
        return None
    return f"its clock is {abs(seconds):.0f} s {'behind' if seconds < 0 else 'ahead of'} that of the first node"


def check_node(node: str, folder: Path, clock: float) -> NodeHealth:
    """Check this machine.

    Args:
        node: Its name in SLURM.
        folder: A folder of the run, for the check of the storage.
        clock: Unix time of the first node at the start of the step.
    """
    import torch

    offset = time.time() - clock
    problems = [problem] if (problem := clock_problem(offset)) is not None else []
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    storage, problem = _check_storage(folder / f".{node}.check")
    problems += [problem] if problem else []
    if devices:
        memory = [torch.cuda.mem_get_info(device) for device in devices]
        free = tuple(each for each, _ in memory)
        problems += [
            f"{each / 1e9:.1f} of {total / 1e9:.1f} GB of GPU {index} are free: another process uses it"
            for index, (each, total) in enumerate(memory)
            if each < FREE_SHARE * total
        ]
        if len(devices) > 1 and (problem := _check_all_reduce(devices)):
            problems.append(problem)
    else:
        free = (_available_bytes() or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),)
        if free[0] < FREE_HOST_BYTES:
            problems.append(f"{free[0] / 1e9:.1f} GB of memory are available")
    speed = min(_matmul_flops(device) for device in devices or [torch.device("cpu")])
    return NodeHealth(node, tuple(problems), speed, free, storage, offset)


def _available_bytes() -> int | None:
    """Return the memory that programs can use without swapping; None without ``/proc``."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _check_storage(path: Path) -> tuple[float, str | None]:
    """Write random bytes, read them back, and return bytes per second and the problem if there is one."""
    data = os.urandom(_STORAGE_BYTES)
    start = time.perf_counter()
    try:
        try:
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                with suppress(AttributeError, OSError):  # Read from the server, not from this node's cache.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return 0.0, f"{path.parent}: cannot be written and read: {error.strerror}"
    problem = None if found == data else f"{path.parent}: the bytes read differ from those written"
    return 2 * len(data) / (time.perf_counter() - start), problem


def _matmul_flops(device: Any) -> float:
    """Return the floating-point operations per second of a square matrix product: the median of several."""
    import torch

    on_gpu = device.type == "cuda"
    size, kind = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    left, right = (torch.ones(size, size, dtype=kind, device=device) for _ in range(2))

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    left @ right  # The first call loads kernels.
    wait()
    times: list[float] = []
    while sum(times) < _MATMUL_SECONDS:
        start = time.perf_counter()
        left @ right
        wait()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(times)


def _check_all_reduce(devices: Sequence[Any]) -> str | None:
    """Sum a tensor over the GPUs of this node with NCCL, in one process."""
    import torch

    values = [torch.full((1 << 20,), float(2**index), device=device) for index, device in enumerate(devices)]
    try:
        torch.cuda.nccl.all_reduce(values)
        sums = [{float(each.min()), float(each.max())} for each in values]
    except RuntimeError as error:
        return f"the all-reduce over its GPUs failed: {str(error).splitlines()[0]}"
    expected = float(2 ** len(devices) - 1)
    wrong = [str(index) for index, each in enumerate(sums) if each != {expected}]
    return f"the all-reduce over its GPUs is wrong on GPU {', '.join(wrong)}" if wrong else None


def read_reports(folder: Path, nodes: Sequence[str]) -> dict[str, NodeHealth]:
    """Return the checks of the nodes. A missing or damaged file counts as no answer."""
    found = {}
    for node in nodes:
        with suppress(OSError, ValueError, KeyError, TypeError):
            found[node] = NodeHealth.from_json(read_json(folder / f"{node}.json"))
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launchers.health", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    node = commands.add_parser("node", help="check this machine and write its file")
    node.add_argument("folder", type=Path)
    node.add_argument("--clock", type=float, required=True, help="Unix time of the first node")
    choose = commands.add_parser("choose", help="name failing nodes and choose those to train on")
    choose.add_argument("folder", type=Path)
    choose.add_argument("--need", type=int, required=True, help="number of nodes to train on")
    choose.add_argument("nodes", nargs="+", help="the nodes of the job, in its order")
    return parser.parse_args()


def main() -> None:
    """Run one of the two commands."""
    args = _arguments()
    if args.command == "node":
        for number in (signal.SIGUSR1, signal.SIGTERM):  # A signal to save the run must not look like a failing node.
            signal.signal(number, signal.SIG_IGN)
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        report = check_node(node, args.folder, args.clock)
        write_whole(args.folder / f"{node}.json", json.dumps(asdict(report)).encode())
        return
    reports = read_reports(args.folder, args.nodes)
    failing = failing_nodes(args.nodes, reports)
    if not reports:
        print("health check: no node answered; the logs slurm-JOB-health-TASK.log say why", file=sys.stderr)
    for node, reason in failing.items() if reports else ():
        print(f"health check: {node}: {reason}", file=sys.stderr)
    healthy = [node for node in args.nodes if node not in failing][: args.need]
    print(",".join(healthy) if len(healthy) == args.need else "-", ",".join(failing) or "-")


if __name__ == "__main__":
    main()
