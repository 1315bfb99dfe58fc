"""A process that writes files while the training process continues.

    trainer   Writer.memory <- a copy of the rank's share
              Writer.send("share" | "publish", ...)  --a line of JSON-->  writer   reads the memory, writes, syncs
              Writer.result()                        <--a line of JSON--

The two processes share the memory of ``Writer.memory``. The writer runs in a new interpreter without torch, and needs
about 20 MB besides that memory. It ends when the trainer ends, even if the trainer is killed. It starts with SIGINT,
SIGTERM, SIGUSR1 and SIGHUP blocked, because the trainer decides when a run stops.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_pipeline.io.processes import end_with, own_sentinel, stop_signals_blocked
from data_pipeline.io.retry import explain_io, retry_io
from mmscale.io.files import finalize, remove_files, write_share

_START = (
    "import sys; sys.path[:] = {path!r}; from mmscale.io.writer_process import main; main({memory}, {size}, {trainer})"
)
_JOIN_SECONDS = 5.0


class WriteError(Exception):
    """A command of the writer failed, or the writer process has ended."""


class Writer:
    """A writer process and the memory that it shares with this process.

    Args:
        capacity_bytes: Size of the shared memory. Pages that are never written use no physical memory.

    Attributes:
        memory: Memory that the writer reads. Do not change it between ``send`` and the ``result`` of that command.
    """

    def __init__(self, capacity_bytes: int) -> None:
        handle, file = _anonymous_file(capacity_bytes)
        self.memory = mmap.mmap(handle, capacity_bytes)
        trainer = own_sentinel()
        code = _START.format(path=sys.path, memory=handle, size=capacity_bytes, trainer=trainer)
        passed = [handle] if trainer is None else [handle, trainer]
        with stop_signals_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=passed
            )
        file.close()  # The mapping and the process keep the memory.
        if trainer is not None:
            os.close(trainer)

    @property
    def pid(self) -> int:
        """Process id of the writer."""
        return self._process.pid

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command to the writer. Call it again only after ``result`` has returned a value.

        Raises:
            WriteError: the process has ended.
        """
        line = json.dumps({"do": command, **arguments}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def result(self, wait_seconds: float | None = 0.0) -> Any:
        """Return the result of the last command; None if the writer is still busy after ``wait_seconds``.

        Args:
            wait_seconds: Longest time to wait; None waits without limit.

        Raises:
            WriteError: the command failed, or the process has ended.
        """
        assert self._process.stdout is not None
        poller = select.poll()  # select.select() does not support descriptors above 1023.
        poller.register(self._process.stdout, select.POLLIN)
        if not poller.poll(None if wait_seconds is None else wait_seconds * 1000):
            return None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        reply = json.loads(line)
        if "failed" in reply:
            raise WriteError(reply["failed"])
        return reply["done"]

    def _ended(self) -> WriteError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_JOIN_SECONDS)
        code = self._process.returncode
        guess = ": out of memory?" if code == -signal.SIGKILL else ""  # The kernel's signal when memory runs out.
        return WriteError(f"the writer process ended unexpectedly (exit code {code}){guess}")

    def close(self) -> None:
        """End the process; kill it after 5 seconds. Idempotent. ``memory`` stays mapped while a view of it exists."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_JOIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _anonymous_file(size: int) -> tuple[int, Any]:
    """Return the descriptor and file object of anonymous memory, which a small /dev/shm does not limit.

    A system without ``memfd_create`` gets a temporary file instead.
    """
    if hasattr(os, "memfd_create"):
        file: Any = os.fdopen(os.memfd_create("mmscale-checkpoint"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it outlives this function.
    os.truncate(file.fileno(), size)
    return file.fileno(), file


def main(handle: int, size: int, trainer: int | None) -> None:
    """Execute one command per line of standard input until the input ends. Write one line of JSON for each result.

    Args:
        handle: Descriptor of the shared memory.
        size: Size of that memory in bytes.
        trainer: Sentinel descriptor of the trainer. This process ends with the trainer even during a write, because a
            restarted run may write the same folder. None where the system has no such descriptors: the process then
            ends after the write.
    """
    if trainer is not None:
        end_with(trainer)
    memory = memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_READ))
    for line in sys.stdin.buffer:
        try:
            reply = {"done": _execute(memory, json.loads(line))}
        except OSError as error:
            reply = {"failed": explain_io(error, with_file=True)}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


def _execute(memory: memoryview, command: dict[str, Any]) -> Any:
    if command["do"] == "publish":
        stale = [Path(path) for path in command["stale"]]
        last = (command["name"], command["text"])
        best = None if command["best"] is None else Path(command["best"])
        finalize(Path(command["partial"]), Path(command["final"]), last, stale, best)
        return True
    start = command["header_bytes"]
    values = []
    for length in command["lengths"]:
        values.append(memory[start : start + length])
        start += length
    header = memory[: command["header_bytes"]].tobytes()
    folder, (first, second) = Path(command["folder"]), command["names"]
    return retry_io(
        lambda: write_share(folder, (first, second), header, command["metadata"], values),
        lambda: remove_files(folder, (first, second)),
    )
