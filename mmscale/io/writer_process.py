"""A process that writes while another one trains.

    trainer   Writer.memory <- a copy of the rank's share
              Writer.order("share" | "publish", ...)  --a line of JSON-->  writer   reads the memory, writes, syncs
              Writer.answer()                         <--a line of JSON--

Both see the same memory; nothing else is handed over. The writer is started from a clean interpreter without torch and
takes some 20 MB beside that memory. It ends with the trainer, however that one ends. From its first instruction on it
has the signals blocked that ask a process group to stop: the trainer decides when to stop.
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
from mmscale.io.files import complete, write_share

_START = (
    "import sys; sys.path[:] = {path!r}; from mmscale.io.writer_process import main; main({memory}, {size}, {trainer})"
)
_JOIN_SECONDS = 5.0


class WriteError(Exception):
    """The writer could not do what it was told, or died."""


class Writer:
    """A writing process and the memory it writes from.

    Args:
        capacity_bytes: Of the memory. Pages that nobody touches take no memory.

    Attributes:
        memory: Shared with the process; to be left alone between ``order`` and ``answer``.
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
        """Of the process."""
        return self._process.pid

    def order(self, what: str, **arguments: Any) -> None:
        """Tells the process to do something; ask ``answer`` before the next order.

        Raises:
            WriteError: it is dead.
        """
        line = json.dumps({"do": what, **arguments}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError as error:
            raise self._dead() from error

    def answer(self, wait_seconds: float | None = 0.0) -> Any:
        """What it has to say about its order; None while it is at work.

        Args:
            wait_seconds: How long to wait for it; None waits until it is done.

        Raises:
            WriteError: it failed, or is dead.
        """
        assert self._process.stdout is not None
        mouth = select.poll()  # ``select`` itself knows no handle above 1023.
        mouth.register(self._process.stdout, select.POLLIN)
        if not mouth.poll(None if wait_seconds is None else wait_seconds * 1000):
            return None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._dead()
        said = json.loads(line)
        if "failed" in said:
            raise WriteError(said["failed"])
        return said["done"]

    def _dead(self) -> WriteError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_JOIN_SECONDS)
        code = self._process.returncode
        guess = ": out of memory?" if code == -signal.SIGKILL else ""  # The kernel's signal when memory runs out.
        return WriteError(f"the process that writes died (exit code {code}){guess}")

    def close(self) -> None:
        """Ends the process, by force if it does not end soon. Idempotent. The memory goes with its last view."""
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
    """Memory with a handle: of no file system, so that a small /dev/shm does not limit it."""
    if hasattr(os, "memfd_create"):
        file: Any = os.fdopen(os.memfd_create("mmscale-checkpoint"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it outlives this function.
    os.truncate(file.fileno(), size)
    return file.fileno(), file


def main(handle: int, size: int, trainer: int | None) -> None:
    """Execute one order per line until the input ends.

    Args:
        handle: Descriptor of the shared memory.
        size: Its bytes.
        trainer: Sentinel of the trainer. This process ends with it even during a write, because a restarted run may
            write the same folder. None where the system has no such descriptors: the process then ends after the write.
    """
    if trainer is not None:
        end_with(trainer)
    memory = memoryview(mmap.mmap(handle, size, access=mmap.ACCESS_READ))
    for line in sys.stdin.buffer:
        try:
            said = {"done": _obey(memory, json.loads(line))}
        except OSError as error:
            said = {"failed": str(error)}
        sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
        sys.stdout.buffer.flush()


def _obey(memory: memoryview, order: dict[str, Any]) -> Any:
    if order["do"] == "publish":
        doomed = [Path(path) for path in order["doomed"]]
        complete(Path(order["partial"]), Path(order["final"]), (order["name"], order["text"]), doomed)
        return True
    start = order["header_bytes"]
    values = []
    for length in order["lengths"]:
        values.append(memory[start : start + length])
        start += length
    header = memory[: order["header_bytes"]].tobytes()
    first, second = order["names"]
    return write_share(Path(order["folder"]), (first, second), header, order["notes"], values)
