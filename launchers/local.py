"""Launch the ranks of a run on this machine, each as a child process.

    launcher --> python -m mmscale.cli.main ARGUMENTS   for each rank, with RANK and the store's port as variables

torchrun is not used: its stores listen on all interfaces and unpickle what they receive. Here the store of the ranks
listens on a loopback socket. The launcher opens the socket, and rank 0 inherits it.
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
"""Seconds between SIGTERM and SIGKILL for the other ranks after one has failed."""
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1
COMMAND_LINE = "mmscale.cli.main"


def launch(
    arguments: Sequence[str], ranks: int, run_dir: Path, module: str = COMMAND_LINE, stdout: int | None = None
) -> int:
    """Run ``mmscale ARGUMENTS`` on ``ranks`` ranks and wait for all of them.

    The launcher forwards SIGINT, SIGTERM, SIGHUP and SIGUSR1 to every rank. A second Ctrl-C kills the ranks. If a rank
    fails, the launcher ends the others. On Linux no rank outlives the launcher, even if the launcher is killed.

    Args:
        arguments: The command line of each rank, without ``mmscale``.
        ranks: Number of processes, at least 1.
        run_dir: Run folder. Ranks other than 0 append their output to ``logs/rank-N.log`` in it.
        module: The module that each rank runs with ``python -m``.
        stdout: Descriptor for rank 0's standard output; None for the launcher's standard output.

    Returns:
        0 if all ranks finished. 75 if they saved and stopped early. 76 if a rank's watchdog ended the run. 130 after
        a second Ctrl-C. 128 + N if the ranks were killed after the launcher received signal N. 1 if a rank was
        killed without such a signal. Otherwise the exit code of the rank that failed first.

    Raises:
        RequestError: ``ranks`` is below 1.
        LaunchError: the log folder cannot be created, or there is no loopback interface.
    """
    if ranks < 1:
        raise RequestError(f"--ranks {ranks}: a run needs at least one rank")
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{logs}: cannot create the log folder: {error.strerror}") from None
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except OSError as error:
        raise LaunchError(f"127.0.0.1: cannot open the socket that the ranks join at: {error.strerror}") from None
    with tempfile.TemporaryFile() as error_file:
        return _Launch(arguments, ranks, logs, module, stdout, error_file).run(listener)


class _Launch:
    """The ranks of one run, and the signals that the launcher received."""

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        logs: Path,
        module: str,
        stdout: int | None,
        error_file: IO[bytes],
    ) -> None:
        self.command = [sys.executable, "-m", module, *arguments]
        self.world_size = ranks
        self.logs = logs
        self.stdout = stdout
        self.error_file = error_file  # Rank 0 also writes its error here, since the launcher cannot read the terminal.
        self.received: list[signal.Signals] = []
        self.num_forwarded = 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.codes: dict[int, int] = {}  # Exit codes by rank, in the order of exit. A thread for each rank adds one.

    def run(self, listener: socket.socket) -> int:
        previous = {number: signal.signal(number, self._handle_signal) for number in _FORWARDED}
        threads = []
        try:
            with listener:
                for rank in range(self.world_size):
                    self._start(rank, listener)
            # Start threads after the last fork: in a child that is forked from a threaded process a lock may be held.
            threads = [
                threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in range(self.world_size)
            ]
            for thread in threads:
                thread.start()
            return self._wait()
        finally:
            for process in self.processes:
                _send(-process.pid, signal.SIGKILL)  # Each rank leads a process group.
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
            inherited = [listener.fileno(), self.error_file.fileno()]
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
                # A separate session: Ctrl-C in a terminal reaches the ranks only through the launcher.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        self.processes.append(process)

    def _watch(self, rank: int) -> None:
        self.codes[rank] = self.processes[rank].wait()

    def _wait(self) -> int:
        """Wait for the ranks and forward signals. Return the launcher's exit code."""
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

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))

    def _forward(self) -> None:
        for number in self.received[self.num_forwarded :]:
            self.num_forwarded += 1
            for process in self.processes:
                _send(process.pid, number)

    def _failed(self) -> list[int]:
        """Return the ranks that failed, in the order of exit."""
        return [rank for rank, code in list(self.codes.items()) if code not in (EXIT_FINISHED, EXIT_STOPPED)]

    def _outcome(self) -> int:
        failed = self._failed()
        if not failed:
            return EXIT_STOPPED if EXIT_STOPPED in self.codes.values() else EXIT_FINISHED
        # A rank that another process killed, or that its watchdog ended, causes the errors of the other ranks.
        ours = {-signal.SIGTERM, *(-number for number in self.received)}
        killed = [rank for rank in failed if self.codes[rank] < 0 and self.codes[rank] not in ours]
        hung = [rank for rank in failed if self.codes[rank] == EXIT_HUNG]
        first = (killed or hung or failed)[0]
        code = self.codes[first]
        self._explain(first, code)
        if code > 0:
            return code
        # Ended by a signal: before the rank handled signals, or killed.
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
        self.error_file.seek(0)
        printed = self.error_file.read().decode(errors="replace")
        if printed and tail.endswith(printed):
            return  # All ranks had the same error, and rank 0 has printed it.
        print(f"the last lines of {log}:", file=sys.stderr)
        sys.stderr.writelines(f"  {line}\n" for line in tail.splitlines())

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"


def _die_with_parent() -> Callable[[], None] | None:
    """Return a function for the child process that requests SIGKILL when the launcher ends. None if not on Linux."""
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None, use_errno=True).prctl

    def request_kill() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # The launcher ended before the request.
            os.kill(os.getpid(), signal.SIGKILL)

    return request_kill


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # The process may have just ended.
        os.kill(pid, number)
