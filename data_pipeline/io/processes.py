"""What the processes of this project have in common: how a process starts, and how it ended.

Not for: what the processes do (``workers``, ``shards.crew``, ``mmscale.io.writer_process``).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import types
from collections.abc import Iterator
from multiprocessing.process import BaseProcess


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """A process that starts within does not run the caller's script again.

    ``multiprocessing`` imports the script into each process that is not forked. A script without
    ``if __name__ == "__main__"`` would then start processes of its own in there, which ends in an error. Our processes
    need nothing of the script: what they call lies in modules.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block the signals that ask a process group to stop, in this thread.

    A process that starts within inherits the mask and keeps it, so no signal reaches it before its Python code runs.
    This process receives a blocked signal when the context ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ending(process: BaseProcess) -> str:
    """How a process ended: ``signal 9 (SIGKILL)`` or ``exit code 1``."""
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {item.value for item in signal.Signals} else "unknown"
    return f"signal {-code} ({name})"
