"""Start a process, end it with its parent, and describe how it ended.

``loader.workers``, ``ordered_pool`` and ``mmscale.io.writer_process`` use it. The process that writes checkpoints
imports this module, so it imports no numpy.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """Context manager: a process that starts within it does not import the caller's script.

    ``multiprocessing`` imports the script into each process that is not forked. A script without
    ``if __name__ == "__main__"`` would then start further processes there, which raises an error. Our processes do not
    need the script, because the functions that they call are in modules.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Context manager: block the signals that ask a process group to stop, in this thread.

    A process that starts within it inherits the mask and keeps it, so no signal reaches it before its Python code runs.
    This process receives a blocked signal when the context ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def replace_environment(variables: Mapping[str, str]) -> None:
    """Replace the environment variables. A process from a fork server has those with which the server started."""
    os.environ.clear()
    os.environ.update(variables)


def own_sentinel() -> int | None:
    """Return a new descriptor that becomes readable when this process ends; None where the system offers none.

    Linux offers it from 5.3 on, unless a sandbox forbids the call.
    """
    try:
        return os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return None


def end_with(sentinel: int) -> None:
    """Make this process exit with code 1 as soon as another process has ended. Returns immediately.

    A thread waits for the sentinel, so this works while the main thread is busy. The end of a pipe from the parent
    does not suffice, because other children of the parent may hold copies of it. The kernel's parent-death signal does
    not either: the parent of a process from a fork server is the fork server.

    Args:
        sentinel: Descriptor that becomes readable when the other process ends: that of ``own_sentinel`` in the parent,
            or ``multiprocessing``'s.
    """
    threading.Thread(target=_exit_after, args=(sentinel,), name="end-with-parent", daemon=True).start()


def _exit_after(sentinel: int) -> None:
    poller = select.poll()  # ``select.select`` rejects descriptors above 1023.
    poller.register(sentinel, select.POLLIN)
    poller.poll()
    os._exit(1)


def ending(process: BaseProcess) -> str:
    """Describe how a process ended: ``signal 9 (SIGKILL)`` or ``exit code 1``."""
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {item.value for item in signal.Signals} else "unknown"
    return f"signal {-code} ({name})"
