"""Runs on one machine listen on loopback only, since their sockets accept any connection without a check."""

from __future__ import annotations

import ipaddress
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.conftest import MakeRun, child_processes, kill_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def process_tree(root: int) -> list[int]:
    return [root, *(pid for child in child_processes(root) for pid in process_tree(child))]


def listening(pids: list[int]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return the addresses of the TCP sockets on which these processes accept connections."""
    targets, found = set(), []
    for fd in (fd for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # The process closed it meanwhile.
            targets.add(os.readlink(fd))
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in targets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                # The kernel prints each 32-bit word in the machine's byte order.
                octets = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.append(ipaddress.ip_address(octets))
    return found


def is_loopback(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_one_machine_listens_on_loopback_only(
    fork_run: MakeRun, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on one machine uses loopback, even if the environment names an interface for runs across nodes."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    run = fork_run("run", ranks, "max_steps=100000", "checkpoint.every_steps=100000", "data.workers=1")
    process = run.start()
    try:
        run.wait_for_step(process, 2)
        addresses = listening(process_tree(process.pid))
    finally:
        kill_group(process)
    assert len(addresses) >= ranks, "each rank's gloo listens for its peers"
    assert [str(address) for address in addresses if not is_loopback(address)] == []
