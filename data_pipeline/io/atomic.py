"""Files that are whole or absent: written beside, synced, then named."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from data_pipeline.io.untrusted import open_regular

_CHUNK_BYTES = 1 << 20


def partial_path(path: Path) -> Path:
    """Where ``path`` grows until it is whole; hidden, and no tool takes it for a shard."""
    return path.with_name(f".{path.name}.partial")


def publish(partial: Path, path: Path) -> None:
    """Gives a finished file its name; after a crash either the old or the new file is there."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``, whole or not at all.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left behind.
    """
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        publish(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def holds(path: Path, data: bytes) -> bool:
    """Whether a regular file has exactly this content."""
    with open_regular(path) as file:
        return file.read(len(data) + 1) == data


def as_utf8(text: str) -> bytes:
    r"""UTF-8 of any string. Half a pair of UTF-16 has no bytes there and becomes ``\ud800``, its escape in JSON."""
    return text.encode(errors="backslashreplace")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a regular file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
