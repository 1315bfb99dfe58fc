"""Write files and folders that are complete or absent, also after a crash.

    write .NAME.partial  -->  sync it  -->  rename it to NAME  -->  sync the folder: the new name is durable

Not for reading; see ``untrusted`` and ``checksums``. The process that writes checkpoints imports this module, so it
imports no numpy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def partial_path(path: Path) -> Path:
    """Return the hidden name that ``path`` has until it is complete."""
    return path.with_name(f".{path.name}.partial")


def open_partial(path: Path) -> IO[bytes]:
    """Create ``partial_path(path)`` for writing and remove what a killed process left there.

    Nothing that exists under the hidden name is opened: a FIFO would block, and a link would redirect the bytes.

    Raises:
        OSError: the system refuses.
    """
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    return partial.open("xb")


def publish(partial: Path, path: Path) -> None:
    """Sync a file or folder, rename it to ``path``, and make the new name durable.

    A file replaces an older one. The files inside a folder must be synced already. After a crash the old state or the
    new one is there.

    Raises:
        OSError: the system refuses.
    """
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file that replaces ``path`` when the block ends; remove it if the block raises.

    Raises:
        OSError: the disk is full or the folder is not writable; ``path`` is unchanged and nothing is left behind.
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
    """Write ``data`` to ``path``, completely or not at all.

    Args:
        path: An older file of this name is replaced.
        data: Content.
        parents: Whether missing folders are created.

    Raises:
        OSError: as ``replacing``.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)


def as_utf8(text: str) -> bytes:
    r"""UTF-8 of any string. Half a pair of UTF-16 has no bytes there and becomes ``\ud800``, its escape in JSON."""
    return text.encode(errors="backslashreplace")


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable.

    Raises:
        OSError: the system refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
