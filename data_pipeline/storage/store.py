"""What a place of objects can do, and the one of local files.

Objects are named by ``Location``. A store is asked from any thread of the process that made it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import DataConfigError, StaleError, StorageError
from data_pipeline.io.atomic import write_whole
from data_pipeline.storage.location import Url

STREAM_CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ObjectInfo:
    """What tells one version of an object from another.

    Attributes:
        size: Bytes.
        etag: The server's name of this version; where it has none, the time of its last change; empty without either.
    """

    size: int
    etag: str


class Store(Protocol):
    """Reads objects of one place."""

    def stat(self, location: Path | Url) -> ObjectInfo:
        """Size and version of an object.

        Raises:
            StorageError: it is absent or refused, or the store failed for too long.
        """
        ...

    def stream(self, location: Path | Url, expected: ObjectInfo | None = None) -> Iterator[bytes]:
        """A whole object from front to back, in chunks of some MiB; the version must not change on the way.

        Raises:
            StaleError: the object is not (or no longer) the expected one.
            StorageError: it is absent, refused or shorter, or the store failed for too long.

        An error is raised between chunks, so the chunks before it are good.
        """
        ...

    def names(self, folder: Path | Url) -> Iterator[Path | Url]:
        """All objects below a folder, in order of their names.

        Raises:
            StorageError: the store cannot list, or failed.
        """
        ...

    def write(self, location: Path | Url, data: bytes) -> None:
        """Writes a small object, whole or not at all.

        Raises:
            StorageError: refused, or the store failed for too long.
        """
        ...


class LocalStore:
    """Files of this machine."""

    def stat(self, location: Path | Url) -> ObjectInfo:
        """As ``Store.stat``."""
        path = _local(location)
        try:
            return _info(path.stat())
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error

    def stream(self, location: Path | Url, expected: ObjectInfo | None = None) -> Iterator[bytes]:
        """As ``Store.stream``; pipes and devices work too."""
        path = _local(location)
        try:
            with path.open("rb", buffering=0) as file:
                _check_same(path, _info(os.fstat(file.fileno())), expected)
                while chunk := file.read(STREAM_CHUNK_BYTES):
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
        raise DataConfigError(f"{location}: a URL was given to the store of local files")
    return location


def _info(stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")


def _check_same(path: Path, found: ObjectInfo, expected: ObjectInfo | None) -> None:
    if expected is not None and found != expected:
        raise StaleError(f"{path}: was replaced: {expected} was expected, {found} is there")
