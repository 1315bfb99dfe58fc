"""Rehearse the rendezvous of a big run: all ranks join one real store of torch on this machine.

    store process (rank 0) <--sockets-- two processes with a thread and a socket for each other rank

The ranks' addresses are all this machine's, so times include no network. Traffic and numbers of sockets are those of
the big run. gloo's exchange of addresses is counted for a few ranks; a polynomial through these counts gives the count
of the big run. If every rank reads the addresses of every rank, the calls grow with the square of the ranks and the
bytes with their cube; if ranks connect when they first talk, all counts grow linearly.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from mmscale.dist import num_messages
from mmscale.errors import LaunchError
from mmscale.rehearse.report import Basis, Report

PART = "rendezvous"
_PROGRAM = (sys.executable, "-m", "mmscale.rehearse.store_program")
_PROCESSES = 2
_SPARE_DESCRIPTORS = 100
_GROUP_RANKS = (4, 8, 16, 32)
_USUAL_DESCRIPTORS = 1024
"""Soft limit of open files that most Linux distributions give a process."""


def rehearse_rendezvous(report: Report, world_size: int, *, most_seconds: float) -> None:
    """Let all ranks join one store, and count the traffic of gloo's exchange of addresses.

    Args:
        report: Gets the figures and findings.
        world_size: Number of ranks of the big run.
        most_seconds: Limit of the store's CPU time. The store has one thread, so no join of all ranks is faster. The
            wall time here also includes the work of all other ranks.

    Raises:
        LaunchError: a rank could not join.
    """
    if not Path("/proc/self/io").exists():
        report.add(PART, "not rehearsed", "this system has no /proc, from which the traffic is read; use Linux")
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    joined = max(2, min(world_size, hard - _SPARE_DESCRIPTORS))
    basis = Basis.REAL if joined == world_size else Basis.SCALED
    found = _join(joined)
    scale = world_size / joined
    report.add(PART, "ranks that joined one store", joined, "ranks", basis)
    report.add(PART, "all ranks joined after", found["joined_seconds"] * scale, "s", basis)
    report.add(PART, "all ranks compared their device types after", found["seconds"] * scale, "s", basis)
    report.add(PART, "CPU time of the store", found["cpu_seconds"] * scale, "s", basis)
    report.add(PART, "bytes that the store received", int(found["received_bytes"] * scale), "bytes", basis)
    report.add(PART, "bytes that the store sent", int(found["sent_bytes"] * scale), "bytes", basis)
    report.add(PART, "open files of the store", int(found["descriptors"] * scale), "files", basis)
    busy = found["cpu_seconds"] * scale
    report.limit(
        "rendezvous-slow",
        busy,
        most_seconds,
        f"rank 0's store computes for {busy:.0f} s until {world_size:,} ranks have joined: raise "
        "engine.timeout_seconds, or use fewer ranks",
    )
    needed = int(found["descriptors"] * scale)
    report.limit(
        "open-files-of-rank-0",
        needed,
        hard,
        f"rank 0 serves {needed:,} sockets, but this machine allows a process {hard:,} open files: raise the hard "
        "limit (`ulimit -Hn`) on the nodes",
    )
    backlog = int(Path("/proc/sys/net/core/somaxconn").read_text())
    report.add(PART, "connections that this machine queues (net.core.somaxconn)", backlog, "connections")
    report.limit(
        "listen-queue",
        world_size,
        backlog,
        f"{world_size:,} ranks connect at once, but this machine queues {backlog:,}: on the node of rank 0 set "
        f"`sysctl net.core.somaxconn={world_size}`. Connections beyond the queue are retried, which takes seconds",
    )
    _rehearse_groups(report, world_size)


def _rehearse_groups(report: Report, world_size: int) -> None:
    counts = {int(world): each for world, each in _run("groups", world_size, *_GROUP_RANKS).items()}

    def at_scale(name: str, degree: int) -> float:
        return extrapolate({world: each[name] for world, each in counts.items()}, world_size, degree)

    calls, sent, sockets = at_scale("calls", 2), at_scale("bytes", 3), at_scale("descriptors", 1)
    report.add(PART, "store calls of one gloo group", int(calls), "calls", Basis.SCALED)
    report.add(PART, "store bytes of one gloo group", int(sent), "bytes", Basis.SCALED)
    report.add(PART, "open files of one rank for one gloo group", int(sockets), "files", Basis.SCALED)
    remedy = "let gloo connect ranks when they first talk: TORCH_GLOO_LAZY_INIT=1"
    messages = num_messages(world_size)
    report.add(PART, "messages one after the other in an all-reduce of small values", messages, "messages")
    report.limit(
        "gloo-store-traffic",
        sent,
        1e10,
        f"the ranks exchange {sent / 1e9:,.0f} GB of addresses through rank 0's store for one gloo group; {remedy}",
    )
    report.limit(
        "gloo-open-files",
        sockets,
        _USUAL_DESCRIPTORS,
        f"each rank opens {sockets:,.0f} files for one gloo group, more than the usual limit of "
        f"{_USUAL_DESCRIPTORS:,}; {remedy}",
    )


def extrapolate(counts: Mapping[int, float], at: int, degree: int) -> float:
    """Return the value at ``at`` of the polynomial of ``degree`` through the points with the largest arguments.

    Uses Lagrange's formula in exact fractions.
    """
    points = {x: counts[x] for x in sorted(counts)[-degree - 1 :]}
    total = Fraction(0)
    for x, y in points.items():
        term = Fraction(y)
        for other in points:
            if other != x:
                term *= Fraction(at - other, x - other)
        total += term
    return float(total)


def _join(world_size: int) -> dict[str, Any]:
    """Run the store and the ranks, and return what the store counted.

    Raises:
        LaunchError: a rank could not join.
    """
    with subprocess.Popen(
        [*_PROGRAM, "serve", str(world_size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        clients: list[subprocess.Popen[str]] = []
        try:
            port = server.stdout.readline().strip()
            others = world_size - 1
            bounds = [1 + others * part // _PROCESSES for part in range(_PROCESSES + 1)]
            clients = [
                subprocess.Popen(
                    [*_PROGRAM, "join", port, str(world_size), str(first), str(last - first)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for first, last in itertools.pairwise(bounds)
                if last > first
            ]
            for client in clients:
                assert client.stdout is not None
                client.stdout.readline()
            for process in (server, *clients):
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # A process that died gives no answer.
                    process.stdin.write("go\n")
                    process.stdin.flush()
            answers = [client.communicate()[0] for client in clients]
            problem = _problem(answers)
            if problem is not None:
                raise LaunchError(f"the rehearsed rendezvous failed: {problem}")
            found: dict[str, Any] = json.loads(server.stdout.readline())
            server.communicate("\n")
        finally:
            for process in (server, *clients):
                process.kill()
    return found


def _problem(answers: Sequence[str]) -> str | None:
    for answer in answers:
        if not answer:
            return "a process with simulated ranks ended without an answer; is there enough memory?"
        errors = json.loads(answer)["errors"]
        if errors:
            return str(errors[0])
    return None


def _run(program: str, *numbers: int) -> dict[str, Any]:
    done = subprocess.run([*_PROGRAM, program, *map(str, numbers)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(
            f"the rehearsal of a gloo group failed with exit code {done.returncode}; its message is above"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
