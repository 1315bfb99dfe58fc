"""A disk cache of bounded size for parts of remote objects, shared by all processes of a machine.

    FOLDER/v1/tmp/...          entries being written; each is locked by its writer, so that leftovers are recognised
    FOLDER/v1/ab/cdef...       entries: content, then a trailer of 16 bytes: magic, CRC-32, size
    FOLDER/v1/usage, lock      the byte count; the lock for storing and removing entries
    FOLDER/v1/claim-ab         locked by the task that fetches an entry of ab/

The file name is a hash of a key that contains the object's URL and version, so an entry cannot become stale. An entry
is published by a rename and verified at each read. A damaged entry is deleted and treated as absent. Entries are not
synced to disk: the checksum detects one that a power failure damaged. Any process may die at any time, because the
system then releases its locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import struct
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import StorageError
from data_pipeline.io.untrusted import open_regular, read_bytes, regular_descriptor
from data_pipeline.storage.config import CacheConfig

_LAYOUT = "v1"  # A new layout uses a new folder; users may delete old ones.
_TRAILER = struct.Struct("<4sIQ")
_MAGIC = b"mmsc"
# Evict down to this share, so that the folder is listed only once for each tenth of its size written.
_KEEP_SHARE = 0.9
_CHUNK_BYTES = 1 << 20
_USAGE_DIGITS = 20


class EntryWriter:
    """Writes one cache entry, piece by piece.

    Attributes:
        size: Content bytes so far.
        descriptor: The temporary file; None if the cache cannot be written.
        error: The first failed write.
        is_stored: Whether the complete entry is in the cache; set after the ``with`` block of ``Cache.entry``.
    """

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self.descriptor: int | None = None
        self.error: OSError | None = None
        self.is_stored = False
        self._max_bytes = max_bytes
        self._crc32 = 0

    def write(self, chunk: bytes) -> None:
        """Append to the content. A disk error sets ``error`` and does not raise, because the caller can continue."""
        self.size += len(chunk)
        self._crc32 = crc32(chunk, self._crc32)
        if self.descriptor is not None and self.error is None and self.size <= self._max_bytes:
            self._write(chunk)

    def seal(self) -> bool:
        """Write the trailer; return False if the entry is larger than the cache. Raises ``error`` if it is set."""
        if self.size > self._max_bytes:
            return False
        self._write(_TRAILER.pack(_MAGIC, self._crc32, self.size))
        if self.error is not None:
            raise self.error
        return True

    def _write(self, chunk: bytes) -> None:
        assert self.descriptor is not None, "only called while the temporary file is open"
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            self.error = error


class Cache:
    """Cache entries by key. Any number of processes and threads may share one folder.

    Args:
        config: Folder and size limit.

    Raises:
        StorageError: the folder cannot be created or locked.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.folder = config.resolved_folder / _LAYOUT
        self._tmp = self.folder / "tmp"
        self._can_write = True
        try:
            # The data set may be private, so only this user may read the folder.
            self._tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                self._drop_leftovers()
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot be used as a cache: {_cause(error)}; set data.cache.folder or "
                "MMSCALE_CACHE to a folder on a local disk"
            ) from error

    def path(self, key: str) -> Path:
        """Return the path that the entry of a key has if it exists. Its content starts at byte 0."""
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]

    def get(self, key: str) -> bytes | None:
        """Return the content of an entry, and mark it as just used; None if it is absent or damaged."""
        path = self.path(key)
        try:
            with open_regular(path) as file:
                content = file.read(max(0, os.fstat(file.fileno()).st_size - _TRAILER.size))
                is_valid = _matches(file.read(), crc32(content), len(content))
                os.utime(file.fileno())
        except OSError:
            return None
        if not is_valid:
            self.drop(key)
        return content if is_valid else None

    def check(self, key: str) -> Path | None:
        """Return the path of a valid entry, for mapping; None if there is none. Reads the whole entry to verify it.

        Another process may evict the file before the caller opens it. A file evicted after that stays readable.
        """
        path, checksum, size = self.path(key), 0, 0
        try:
            with open_regular(path) as file:
                total = os.fstat(file.fileno()).st_size - _TRAILER.size
                while size < total and (chunk := file.read(min(_CHUNK_BYTES, total - size))):
                    checksum, size = crc32(chunk, checksum), size + len(chunk)
                is_valid = _matches(file.read(), checksum, size)
                os.utime(file.fileno())
        except OSError:
            return None
        if not is_valid:
            self.drop(key)
        return path if is_valid else None

    def put(self, key: str, content: bytes) -> bool:
        """Store an entry atomically; return False if it is larger than the cache or cannot be written."""
        with self.entry(key) as entry:
            entry.write(content)
        return entry.is_stored

    @contextlib.contextmanager
    def entry(self, key: str) -> Iterator[EntryWriter]:
        """Write an entry piece by piece. The end of the block stores it, unless the block raises.

        If the disk cannot be written, this process warns once and then stops writing to the cache.
        """
        entry = EntryWriter(self.config.max_bytes)
        with contextlib.ExitStack() as stack:
            name = ""
            if self._can_write:
                try:
                    entry.descriptor, name = stack.enter_context(self._temporary())
                except OSError as error:
                    self._stop_writing(error)
            yield entry
            if entry.descriptor is None:
                return
            try:
                if entry.error is not None:
                    raise entry.error
                if entry.seal():
                    self._publish(name, self.path(key), entry.size + _TRAILER.size)
                    entry.is_stored = True
            except OSError as error:
                self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        self._can_write = False
        warnings.warn(
            f"the cache {self.folder} cannot be written ({_cause(error)}); this process continues without it",
            stacklevel=4,
        )

    def drop(self, key: str) -> None:
        """Remove an entry, if it exists."""
        path = self.path(key)
        with contextlib.suppress(OSError), self._locked():
            size = path.stat().st_size
            path.unlink()
            self._set_usage(max(0, self.usage() - size))

    def try_claim(self, key: str) -> BinaryIO | None:
        """Claim the right to fetch an entry until the returned file is closed; None while another task holds the claim.

        Several keys share a claim, so do not hold one while waiting for another. A claim only avoids duplicate fetches:
        if its lock file cannot be used, every caller gets a claim.
        """
        try:
            file = self._open(f"claim-{self.path(key).parent.name}")
        except OSError:
            return io.BytesIO()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def usage(self) -> int:
        """Return the recorded size of all entries in bytes. A crash can make it too high until the next eviction."""
        try:
            return int(read_bytes(self.folder / "usage", most_bytes=_USAGE_DIGITS))
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._entries())

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[int, str]]:
        with self._locked():  # Otherwise ``_drop_leftovers`` could delete the file before it is locked.
            descriptor, name = tempfile.mkstemp(dir=self._tmp)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield descriptor, name
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)  # It no longer exists if it was published.
            with contextlib.suppress(OSError):  # A network file system may fail here; the checksum detects it.
                os.close(descriptor)

    def _publish(self, name: str, path: Path, size: int) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            usage = self.usage() + size
            with contextlib.suppress(FileNotFoundError):  # Another process may have stored the same entry.
                known = path.stat().st_size
                path.unlink()
                usage = max(size, usage - known)
            # Update the count before the rename. A crash in between leaves it too high, and the next eviction
            # recounts the folder.
            self._set_usage(usage)
            if usage > self.config.max_bytes:
                self._evict(size)
            os.replace(name, path)

    def _evict(self, incoming: int) -> None:
        """Remove the least recently used entries until all, with ``incoming`` bytes, take ``_KEEP_SHARE`` of the limit.

        Also recounts the bytes of all entries. The caller holds the lock.
        """
        self._drop_leftovers()
        entries = sorted(self._entries())
        usage = sum(size for _, size, _ in entries) + incoming
        for _, size, path in entries:
            if usage <= self.config.max_bytes * _KEEP_SHARE:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            usage -= size
        self._set_usage(usage)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (time of last use in ns, bytes, path) of each entry."""
        for group in os.scandir(self.folder):
            if len(group.name) == 2 and group.is_dir():
                for entry in os.scandir(group.path):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        yield stat.st_mtime_ns, stat.st_size, Path(entry.path)

    def _drop_leftovers(self) -> None:
        """Remove unlocked temporary files, whose writers are dead. The caller holds the folder's lock."""
        for entry in os.scandir(self._tmp):
            with contextlib.suppress(OSError), open_regular(Path(entry.path)) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._open("lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _open(self, name: str) -> BinaryIO:
        """Open a file of the folder for writing in place; create it if it is absent."""
        return os.fdopen(regular_descriptor(self.folder / name, os.O_WRONLY | os.O_CREAT), "wb", buffering=0)

    def _set_usage(self, usage: int) -> None:
        # Always one write of 20 bytes, which a kill cannot split.
        with self._open("usage") as file:
            file.write(b"%0*d" % (_USAGE_DIGITS, usage))


def _cause(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def _matches(trailer: bytes, crc32: int, size: int) -> bool:
    return trailer == _TRAILER.pack(_MAGIC, crc32, size)
