"""One rank of a local run: what torchrun starts.

    launcher --> torchrun --> this, once a rank --> main() of the command line, in this process

It adds what torchrun leaves out: a rank dies with its parent (torchrun gives each rank a session of its own, so killing
the launcher's process group would leave them running), every rank's exit code survives, and only rank 0 speaks on the
terminal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from launchers import EXIT_FILE_VARIABLE, EXIT_STOPPED

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel for SIGKILL when the parent ends. Linux only; elsewhere it does nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # The parent ended before the kernel knew of our wish.
        os.kill(os.getpid(), signal.SIGKILL)


def log_path(logs: Path, rank: int) -> Path:
    """Where the words of a rank other than 0 go."""
    return logs / f"rank-{rank}.log"


def redirect(rank: int, logs: Path) -> None:
    """Rank 0 to the terminal, the others to a file each.

    torchrun's own stderr is a file (it ends in a traceback when a rank fails), so the launcher hands the terminal down
    as stdin, which torchrun passes on untouched and training never reads.
    """
    if rank == 0:
        os.dup2(0, 2)
    else:
        target = os.open(log_path(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def main(arguments: list[str]) -> int:
    """``CONTROL LOGS MODULE WORD...``: runs ``MODULE.main([WORD, ...])`` and notes its exit code in ``CONTROL``."""
    die_with_parent()
    control, logs, module, *words = arguments
    rank = int(os.environ["RANK"])
    redirect(rank, Path(logs))
    _write(Path(control) / f"pid-{rank}", os.getpid())
    os.environ[EXIT_FILE_VARIABLE] = str(Path(control) / f"exit-{rank}")
    code = import_module(module).main(words)
    _write(Path(control) / f"exit-{rank}", code)
    # torchrun takes every code but 0 for a failure and kills the other ranks, which may still be closing their files.
    return 0 if code == EXIT_STOPPED else int(code)


def _write(path: Path, number: int) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(str(number))
    beside.rename(path)


if __name__ == "__main__":
    _code = main(sys.argv[1:])
    # A command line may know better how a process ends that had threads and peers.
    getattr(import_module(sys.argv[3]), "leave", sys.exit)(_code)
