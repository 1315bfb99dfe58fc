"""Several ranks on this machine, under torchrun in its one-node mode.

Signals go from here straight to the ranks, not through torchrun: it would kill them 30 seconds after the first one,
finished saving or not, and it dies of SIGUSR1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launchers import EXIT_FINISHED, EXIT_HUNG, EXIT_STOPPED
from launchers.rank import die_with_parent, log_path
from mmscale.errors import LaunchError

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
"""For the other ranks, after the first was ended by its watchdog. torchrun would give a stopped process 30 more."""
_TAIL_LINES = 15
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
        run_dir: Words of ranks other than 0 go to ``logs/rank-N.log`` in it, torchrun's own to ``logs/torchrun.log``.
        module: Where the ranks' ``main(words)`` is.
        stdout: Descriptor for what rank 0 prints; None for our own standard output.

    Returns:
        0 if all ranks finished, 75 if they saved and stopped on a signal, 76 if a rank's watchdog ended the run, 130
        after a second Ctrl-C, else the exit code of the rank that failed first.

    Raises:
        LaunchError: ``ranks`` is below 1, or the log folder cannot be made.
    """
    if ranks < 1:
        raise LaunchError(f"--ranks {ranks}: a run needs at least one rank")
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{logs}: the log folder cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix="mmscale-launch-") as control:
        return _Launch(words, ranks, logs, Path(control), module, stdout).run()


class _Launch:
    """One run of torchrun and the signals that reach it."""

    def __init__(
        self, words: Sequence[str], ranks: int, logs: Path, control: Path, module: str, stdout: int | None
    ) -> None:
        self.words = words
        self.ranks = ranks
        self.logs = logs
        self.control = control
        self.module = module
        self.stdout = stdout
        self.received: list[signal.Signals] = []
        self.delivered = [0] * ranks

    def run(self) -> int:
        previous = {number: signal.signal(number, self._note) for number in _FORWARDED}
        try:
            process = self._start()
            try:
                while process.poll() is None:
                    self._forward()
                    if self.received.count(signal.SIGINT) > 1:
                        return 130
                    if self._is_hung():
                        break
                    time.sleep(_POLL_SECONDS)
            finally:
                self._sweep(process)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._outcome(process.returncode)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"),
            *(f"--nproc-per-node={self.ranks}", "--max-restarts=0", "-m", "launchers.rank"),
            *(str(self.control), str(self.logs.resolve()), self.module, *self.words),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with open(self.logs / "torchrun.log", "ab") as log:
            # stdin carries the terminal down to rank 0: see launchers.rank.redirect.
            return subprocess.Popen(
                command, env=environment, stdin=2, stdout=self.stdout, stderr=log, preexec_fn=_detach
            )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))

    def _pid(self, rank: int) -> int | None:
        path = self.control / f"pid-{rank}"
        return int(path.read_text()) if path.exists() else None

    def _forward(self) -> None:
        """Passes on what a rank has not got yet; a rank that is still starting gets it once it has a number."""
        for rank in range(self.ranks):
            pid = self._pid(rank) if self.delivered[rank] < len(self.received) else None
            if pid is None:
                continue
            for number in self.received[self.delivered[rank] :]:
                _send(pid, number)
            self.delivered[rank] = len(self.received)

    def _sweep(self, process: subprocess.Popen[bytes]) -> None:
        """Leaves nothing running: the ranks, what they started, torchrun."""
        for rank in range(self.ranks):
            pid = self._pid(rank)
            if pid is not None:
                _send(-pid, signal.SIGKILL)  # torchrun made each rank the head of a process group.
        process.kill()
        process.wait()

    def _is_hung(self) -> bool:
        """Whether a watchdog ended its rank and the others had time to say their last words."""
        hung = [rank for rank in range(self.ranks) if self._code(rank) == EXIT_HUNG]
        return bool(hung) and time.time() > min(map(self._time_of_end, hung)) + _LAST_WORDS_SECONDS

    def _outcome(self, torchrun_code: int) -> int:
        codes = [self._code(rank) for rank in range(self.ranks)]
        if all(code in (EXIT_FINISHED, EXIT_STOPPED) for code in codes):
            return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_FINISHED
        failed = [rank for rank, code in enumerate(codes) if code not in (EXIT_FINISHED, EXIT_STOPPED)]
        # The rank that hung was killed in the end; the one whose watchdog spoke knows more.
        hung = [rank for rank in failed if codes[rank] == EXIT_HUNG]
        first = min(hung or failed, key=self._time_of_end)
        self._explain(first, codes[first])
        code = codes[first]
        if code is not None:
            return code
        if self.received:
            return 128 + int(self.received[0])  # Stopped before there was anything to save.
        return torchrun_code if torchrun_code > 0 else 1

    def _code(self, rank: int) -> int | None:
        """None: the rank was killed, or ended in a way that no Python code saw."""
        path = self.control / f"exit-{rank}"
        return int(path.read_text()) if path.exists() else None

    def _time_of_end(self, rank: int) -> float:
        # A killed rank left no code; what the others report is a consequence of that.
        path = self.control / f"exit-{rank}"
        return path.stat().st_mtime if path.exists() else 0.0

    def _explain(self, rank: int, code: int | None) -> None:
        what = "was killed" if code is None else f"ended with exit code {code}"
        print(f"mmscale launch: rank {rank} {what}; the other ranks were ended", file=sys.stderr)
        log = log_path(self.logs, rank)
        if rank > 0 and log.exists():
            print(f"last words in {log}:", file=sys.stderr)
            with open(log, encoding="utf-8", errors="replace") as lines:
                sys.stderr.writelines(f"  {line.rstrip()}\n" for line in deque(lines, maxlen=_TAIL_LINES))
        elif code is None:
            print(f"torchrun's view is in {self.logs / 'torchrun.log'}", file=sys.stderr)


def _detach() -> None:
    # Out of the terminal's process group, so that Ctrl-C reaches the ranks once, through us.
    os.setpgid(0, 0)
    die_with_parent()


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # It may just have ended.
        os.kill(pid, number)
