"""Repeat file operations while a network file system is lost for a moment.

A server that restarts, or a client that loses its connection, answers with errors such as ``EIO`` or ``ESTALE`` for
some seconds. Writers of logs and checkpoints and readers of shards wait for it. Not for a full disk, a missing file or
damaged data: waiting does not change them, so their error is raised at once. Not for memory-mapped files either: the
kernel kills a process that reads a mapped page of a lost file system (SIGBUS).
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAIT_SECONDS = 120.0
"""Longest time to wait for a lost file system, from the first error."""
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0
_LOST = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ESHUTDOWN", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETUNREACH", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)
"""Errors of NFS, Lustre and FUSE file systems whose server or connection is gone."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def retry_io(work: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
    """Return the result of ``work``. Repeat it with growing delays while it fails because a file system is lost.

    Print one line to stderr before the first repetition.

    Args:
        work: File operations that may be repeated after an attempt that failed in the middle.
        undo: Called before each repetition, for example to remove a part that was written. Its errors count as errors
            of ``work``.

    Raises:
        OSError: another error, such as a full disk, at once; the last error, after ``WAIT_SECONDS``.
    """
    deadline, delay = None, FIRST_DELAY_SECONDS
    while True:
        try:
            if deadline is not None:
                undo()
            return work()
        except OSError as error:
            if error.errno not in _LOST:
                raise
            now = time.monotonic()
            if deadline is None:
                deadline = now + WAIT_SECONDS
                print(
                    f"mmscale: {error.filename or 'a file'}: {error.strerror}; trying again for {WAIT_SECONDS:.0f} s, "
                    "because the file system may come back",
                    file=sys.stderr,
                    flush=True,
                )
            if now >= deadline:
                raise
        time.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_SECONDS)


def explain_io(error: OSError, *, with_file: bool = False) -> str:
    """Return the reason of an error, with the remedy if the disk is full or a quota is used up.

    Args:
        error: The error.
        with_file: Whether to begin with the path of the file, if the error has one.
    """
    path = f"{error.filename}: " if with_file and error.filename is not None else ""
    remedy = "; free space, then start the same command again" if error.errno in _FULL else ""
    return f"{path}{error.strerror or error}{remedy}"
