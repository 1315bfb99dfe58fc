"""Write files and folders that are complete or absent, also after a crash.

    write .NAME.partial  -->  sync it  -->  rename it to NAME  -->  sync the folder: the new name survives a crash

Not for reading; see ``untrusted`` and ``checksums``. The process that writes checkpoints imports this module, so it
imports no numpy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.io.retry import retry_io


def partial_path(path: Path) -> Path:
    """Return the hidden name that ``path`` has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def open_partial(path: Path) -> IO[bytes]:
    """Create ``partial_path(path)`` for writing; replace a leftover of a killed process.

    An existing file of the hidden name is deleted, not opened: a FIFO would block, and a link would redirect the bytes.

    Raises:
        OSError: a system call fails.
    """
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    return partial.open("xb")


def publish(partial: Path, path: Path) -> None:
    """Sync a file or folder, rename it to ``path``, and sync the folder that contains it.

    An older file of that name is replaced. The caller must have synced the files inside a folder. After a crash,
    ``path`` is in either the old or the new state.

    Raises:
        OSError: a system call fails.
    """
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file that replaces ``path`` when the block ends; remove it if the block raises.

    Raises:
        OSError: the disk is full or the folder is not writable. ``path`` is unchanged, unless only the last
            step, syncing the folder, failed. The hidden file is removed.
    """
    try:
        with open_partial(path) as file:
            yield file
        publish(partial_path(path), path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial_path(path).unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes, *, parents: bool = False) -> None:
    """Write ``data`` to ``path``, completely or not at all. Wait for a file system that is lost, see ``retry``.

    Args:
        path: An older file of this name is replaced.
        data: Content.
        parents: Whether missing folders are created.

    Raises:
        OSError: as ``replacing``.
    """

    def write() -> None:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)

    retry_io(write)


def append_whole(path: Path, data: bytes) -> None:
    """Append ``data`` to a regular file, completely or not at all. Wait for a file system that is lost, see ``retry``.

    Only one process may write the file. It is opened each time: a server that restarts invalidates open files, and NFS
    reports a failed write when the file is closed.

    Raises:
        OSError: as ``append_regular``, or the file cannot be written. The file has its old content, unless removing a
            part of ``data`` failed too.
    """
    from data_pipeline.io.untrusted import append_regular  # Imports numpy, which the writer process does not need.

    size: int | None = None

    def append() -> None:
        nonlocal size
        with append_regular(path) as file:
            if size is None:
                size = os.fstat(file.fileno()).st_size
            else:
                file.truncate(size)  # An earlier attempt may have written a part.
            file.write(data)

    try:
        retry_io(append)
    except OSError:
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise


def as_utf8(text: str) -> bytes:
    r"""Encode any string as UTF-8. A lone surrogate, which UTF-8 cannot encode, becomes its JSON escape ``\ud800``."""
    return text.encode(errors="backslashreplace")


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to disk (``fsync``).

    Raises:
        OSError: a system call fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
