"""The interface of a store of objects, and its implementation for local files.

Objects are named by ``Location``. All threads of the process that created a store may use it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import DataConfigError, StaleError, StorageError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.retry import retry_io
from data_pipeline.storage.location import Url

STREAM_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ObjectInfo:
    """Size and version of an object. Unequal values mean that the object was replaced.

    A replacement of equal size is not noticed if the server reports neither an identifier nor a modification time.

    Attributes:
        size: Bytes.
        etag: The server's version identifier; without one, the modification time in seconds; else empty. For a local
            file, modification time and inode.
    """

    size: int
    etag: str


class Store(Protocol):
    """Reads and writes objects of one bucket, one host or the local disk."""

    def stat(self, location: Path | Url) -> ObjectInfo:
        """Return size and version of an object.

        Raises:
            StorageError: the object is absent, access is denied, or the store failed for too long.
        """
        ...

    def stream(self, location: Path | Url, expected: ObjectInfo | None = None) -> Iterator[bytes]:
        """Yield a whole object sequentially, in chunks of ``STREAM_CHUNK_BYTES`` or less.

        Chunks that were yielded before an error are valid.

        Raises:
            StaleError: the object does not have the expected version; remote stores also raise if it changes meanwhile.
            StorageError: the object is absent or too short, access is denied, or the store failed for too long.
        """
        ...

    def names(self, folder: Path | Url) -> Iterator[Path | Url]:
        """Yield all objects below a folder, sorted by name.

        Raises:
            StorageError: the store cannot list objects, or failed.
        """
        ...

    def write(self, location: Path | Url, data: bytes) -> None:
        """Write a small object atomically; it may replace an older one.

        Raises:
            StorageError: the store rejects the object, or failed for too long.
        """
        ...


class LocalStore:
    """The files of this machine."""

    def stat(self, location: Path | Url) -> ObjectInfo:
        """As ``Store.stat``."""
        path = _local(location)
        try:
            return _info(retry_io(path.stat))
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error

    def stream(self, location: Path | Url, expected: ObjectInfo | None = None) -> Iterator[bytes]:
        """As ``Store.stream``; also reads pipes and devices. Waits for a file system that is lost, see ``io.retry``."""
        path, at = _local(location), 0
        try:
            file = retry_io(lambda: path.open("rb", buffering=0))
            with contextlib.closing(file):
                first = os.fstat(file.fileno())
                _check_same(path, _info(first), expected)

                def reopen() -> None:  # A server that restarts invalidates open files.
                    with path.open("rb", buffering=0) as again:
                        found = os.fstat(again.fileno())
                        if (found.st_size, found.st_mtime_ns) != (first.st_size, first.st_mtime_ns):
                            raise StaleError(f"{path}: was replaced while it was read")
                        os.dup2(again.fileno(), file.fileno(), inheritable=False)
                    file.seek(at)

                def read() -> bytes:
                    return file.read(STREAM_CHUNK_BYTES)

                while chunk := retry_io(read, reopen) if stat.S_ISREG(first.st_mode) else read():
                    at += len(chunk)
                    yield chunk
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error

    def names(self, folder: Path | Url) -> Iterator[Path | Url]:
        """As ``Store.names``."""
        yield from sorted(path for path in _local(folder).rglob("*") if path.is_file())

    def write(self, location: Path | Url, data: bytes) -> None:
        """As ``Store.write``."""
        path = _local(location)
        try:
            write_whole(path, data)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _local(location: Path | Url) -> Path:
    if isinstance(location, Url):
        raise DataConfigError(f"{location}: expected a local path, got a URL")
    return location


def _info(stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")


def _check_same(path: Path, found: ObjectInfo, expected: ObjectInfo | None) -> None:
    if expected is not None and found != expected:
        raise StaleError(f"{path}: was replaced: expected {expected}, found {found}")
