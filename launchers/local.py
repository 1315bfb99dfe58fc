"""Several ranks on this machine: each is a child process of the launcher.

    launcher --> python -m mmscale.cli.main WORDS    once a rank, with its RANK and the store's port in the environment

torchrun is not used: its stores listen on all interfaces and unpickle what they receive. The ranks' store
listens on a loopback socket, which the launcher opens and rank 0 inherits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from launchers import EXIT_FINISHED, EXIT_HUNG, EXIT_STOPPED
from mmscale.errors import LaunchError, RequestError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL for the other ranks after one has failed."""
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1
COMMAND_LINE = "mmscale.cli.main"


def launch(
    words: Sequence[str], ranks: int, run_dir: Path, module: str = COMMAND_LINE, stdout: int | None = None
) -> int:
    """Runs ``mmscale WORDS`` on ``ranks`` ranks and waits for all of them.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to every rank; a second Ctrl-C kills them. If a rank fails, the
    others are ended. No process outlives this one, even if this one is killed.

    Args:
        words: The command line of each rank, without ``mmscale``.
        ranks: Number of processes, at least 1.
        run_dir: Ranks other than 0 write their output to ``logs/rank-N.log`` in it.
        module: The module that each rank runs with ``python -m``.
        stdout: Descriptor for what rank 0 prints; None for our own standard output.

    Returns:
        0 if all ranks finished, 75 if they saved and stopped on a signal, 76 if a rank's watchdog ended the run, 130
        after a second Ctrl-C, 1 if a rank was killed, else the exit code of the rank that failed first.

    Raises:
        RequestError: ``ranks`` is below 1.
        LaunchError: The log folder cannot be made, or there is no loopback interface.
    """
    if ranks < 1:
        raise RequestError(f"--ranks {ranks}: a run needs at least one rank")
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{logs}: the log folder cannot be made: {error.strerror}") from None
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except OSError as error:
        raise LaunchError(f"127.0.0.1: no socket for the ranks to meet at: {error.strerror}") from None
    with tempfile.TemporaryFile() as complaint:
        return _Launch(words, ranks, logs, module, stdout, complaint).run(listener)


class _Launch:
    """The ranks of one run and the signals that reach it."""

    def __init__(
        self,
        words: Sequence[str],
        ranks: int,
        logs: Path,
        module: str,
        stdout: int | None,
        complaint: IO[bytes],
    ) -> None:
        self.command = [sys.executable, "-m", module, *words]
        self.world_size = ranks
        self.logs = logs
        self.stdout = stdout
        self.complaint = complaint  # Rank 0 repeats its error here: the launcher does not read the terminal.
        self.received: list[signal.Signals] = []
        self.delivered = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.codes: dict[int, int] = {}  # In the order of their ends; a thread for each rank writes.

    def run(self, listener: socket.socket) -> int:
        previous = {number: signal.signal(number, self._note) for number in _FORWARDED}
        threads = []
        try:
            with listener:
                for rank in range(self.world_size):
                    self._start(rank, listener)
            # After the last fork: a forked child of a process with threads may find a lock taken.
            threads = [
                threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in range(self.world_size)
            ]
            for thread in threads:
                thread.start()
            return self._wait()
        finally:
            for process in self.processes:
                _send(-process.pid, signal.SIGKILL)  # Each rank is the head of a process group.
            for thread in threads:
                thread.join(_GRACE_SECONDS)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self, rank: int, listener: socket.socket) -> None:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        inherited = []
        if rank == 0:
            inherited = [listener.fileno(), self.complaint.fileno()]
            variables |= {"MMSCALE_LISTENER": str(inherited[0]), "MMSCALE_COMPLAINT": str(inherited[1])}
        with contextlib.ExitStack() as files:
            log = None if rank == 0 else files.enter_context(open(self._log(rank), "ab"))
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log or self.stdout,
                stderr=log,
                pass_fds=inherited,
                # A session of its own: Ctrl-C in a terminal reaches the ranks once, through the launcher.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        self.processes.append(process)

    def _watch(self, rank: int) -> None:
        self.codes[rank] = self.processes[rank].wait()

    def _wait(self) -> int:
        """Waits for the ranks and passes signals on; returns the launcher's exit code."""
        deadline = float("inf")
        while len(self.codes) < self.world_size and time.monotonic() < deadline:
            self._forward()
            if self.received.count(signal.SIGINT) > 1:
                return 130
            if deadline == float("inf") and self._failed():
                deadline = time.monotonic() + _GRACE_SECONDS
                for process in self.processes:
                    _send(process.pid, signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
        return self._outcome()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))

    def _forward(self) -> None:
        for number in self.received[self.delivered :]:
            self.delivered += 1
            for process in self.processes:
                _send(process.pid, number)

    def _failed(self) -> list[int]:
        """The ranks that failed, in the order of their ends."""
        return [rank for rank, code in list(self.codes.items()) if code not in (EXIT_FINISHED, EXIT_STOPPED)]

    def _outcome(self) -> int:
        failed = self._failed()
        if not failed:
            return EXIT_STOPPED if EXIT_STOPPED in self.codes.values() else EXIT_FINISHED
        # A rank that somebody else killed, or that its watchdog ended, is the cause of its peers' errors.
        ours = {-signal.SIGTERM, *(-number for number in self.received)}
        killed = [rank for rank in failed if self.codes[rank] < 0 and self.codes[rank] not in ours]
        hung = [rank for rank in failed if self.codes[rank] == EXIT_HUNG]
        first = (killed or hung or failed)[0]
        code = self.codes[first]
        self._explain(first, code)
        if code > 0:
            return code
        # Without an exit code: stopped before there was anything to save, or killed.
        return 128 + int(self.received[0]) if self.received else 1

    def _explain(self, rank: int, code: int) -> None:
        end = f"ended with exit code {code}"
        if code < 0:
            end = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        if code == -signal.SIGKILL:
            end += ", as the kernel does when memory runs out"
        print(f"mmscale launch: rank {rank} {end}; the other ranks were ended", file=sys.stderr)
        if rank == 0:
            return
        log = self._log(rank)
        with open(log, encoding="utf-8", errors="replace") as lines:
            tail = "".join(deque(lines, maxlen=_TAIL_LINES))
        self.complaint.seek(0)
        said = self.complaint.read().decode(errors="replace")
        if said and tail.endswith(said):
            return  # All ranks found the same error; rank 0 has printed it.
        print(f"the last lines of {log}:", file=sys.stderr)
        sys.stderr.writelines(f"  {line}\n" for line in tail.splitlines())

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before it becomes a rank: it asks the kernel for SIGKILL when the launcher ends. Linux only."""
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # The launcher ended before the kernel knew.
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # It may just have ended.
        os.kill(pid, number)
