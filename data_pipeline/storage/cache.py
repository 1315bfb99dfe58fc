"""A folder of bounded size that holds pieces of remote objects, shared by all processes of a machine.

    FOLDER/v1/tmp/...          entries that are being written; locked by their writer, so leftovers are told from work
    FOLDER/v1/ab/cdef...       entry: content, then 16 bytes: magic, crc32, size
    FOLDER/v1/lock, usage      guards the count of bytes; the count

A name is a hash of (URL, version of the object, place inside it), so an entry is never out of date. An entry appears by
rename, and is checked whenever it is read: a damaged one is dropped and counts as absent. Nothing is synced: after a
power cut the checksum decides. Any process may die at any moment; the lock goes with it.
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

_LAYOUT = "v1"  # Another layout gets another folder; old ones may be deleted by hand.
_TRAILER = struct.Struct("<4sIQ")
_MAGIC = b"mmsc"
_KEEP_SHARE = 0.9  # Freeing a tenth at once: the folder is listed once per tenth that is written.
_CHUNK_BYTES = 1 << 20
_USAGE_DIGITS = 20


class Entry:
    """An entry that is being written."""

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self.descriptor: int | None = None
        self.error: OSError | None = None
        self.is_stored = False
        self._max_bytes = max_bytes
        self._crc32 = 0

    def write(self, piece: bytes) -> None:
        """Adds to the content. A disk that fails is noted, not raised: whoever has the bytes needs no cache."""
        self.size += len(piece)
        self._crc32 = crc32(piece, self._crc32)
        if self.descriptor is not None and self.error is None and self.size <= self._max_bytes:
            self._write(piece)

    def seal(self) -> bool:
        """Writes the trailer; False if the entry is larger than the cache."""
        if self.size > self._max_bytes:
            return False
        self._write(_TRAILER.pack(_MAGIC, self._crc32, self.size))
        if self.error is not None:
            raise self.error
        return True

    def _write(self, piece: bytes) -> None:
        assert self.descriptor is not None, "written only between opening and closing"
        view = memoryview(piece)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            self.error = error


class Cache:
    """Entries by key. Any number of processes and threads may use one folder.

    Args:
        config: Folder and size.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.folder = config.place / _LAYOUT
        self._tmp = self.folder / "tmp"
        self._can_write = True
        try:
            # A data set may be private; so is what is kept of it.
            self._tmp.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                self._drop_leftovers()
        except OSError as error:
            raise StorageError(
                f"{self.folder}: cannot be used as a cache: {_cause(error)}; name a folder on a local disk "
                "by data.cache.folder or MMSCALE_CACHE"
            ) from error

    def path(self, key: str) -> Path:
        """Where the entry of a key lies if it is there. Its content starts at byte 0."""
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / name[2:]

    def get(self, key: str) -> bytes | None:
        """The content; None if it is absent or damaged. Renews its place in the order of last use."""
        path = self.path(key)
        try:
            with open_regular(path) as file:
                content = file.read(max(0, os.fstat(file.fileno()).st_size - _TRAILER.size))
                sound = _fits(file.read(), crc32(content), len(content))
                os.utime(file.fileno())
        except OSError:
            return None
        if not sound:
            self.drop(key)
        return content if sound else None

    def check(self, key: str) -> Path | None:
        """The file of a whole and sound entry, to be mapped; None if there is none. Reads it once, in small steps.

        A file that is evicted while it is mapped stays readable.
        """
        path, checksum, size = self.path(key), 0, 0
        try:
            with open_regular(path) as file:
                total = os.fstat(file.fileno()).st_size - _TRAILER.size
                while size < total and (chunk := file.read(min(_CHUNK_BYTES, total - size))):
                    checksum, size = crc32(chunk, checksum), size + len(chunk)
                sound = _fits(file.read(), checksum, size)
                os.utime(file.fileno())
        except OSError:
            return None
        if not sound:
            self.drop(key)
        return path if sound else None

    def put(self, key: str, content: bytes) -> bool:
        """Stores an entry, whole or not at all. False if it is larger than the cache, or the disk refuses."""
        with self.entry(key) as entry:
            entry.write(content)
        return entry.is_stored

    @contextlib.contextmanager
    def entry(self, key: str) -> Iterator[Entry]:
        """An entry in pieces: stored at the end of the block, unless an exception leaves it.

        A disk that refuses is said once; then this process goes on without writing.
        """
        entry = Entry(self.config.max_bytes)
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
            f"the cache {self.folder} cannot be written ({_cause(error)}); this process goes on without it",
            stacklevel=4,
        )

    def drop(self, key: str) -> None:
        """Removes an entry; nothing happens if it is absent."""
        path = self.path(key)
        with contextlib.suppress(OSError), self._locked():
            size = path.stat().st_size
            path.unlink()
            self._set_usage(max(0, self.usage() - size))

    def try_single(self, key: str) -> BinaryIO | None:
        """A claim to fetch an entry, held until it is closed; None while another process or task has it.

        Other entries share it, so hold none while waiting for one. A claim only saves a second fetch: if its file
        cannot be used, every caller gets a claim.
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
        """Bytes of all entries, as counted; what a crash left over is found when the folder is next full."""
        try:
            return int(read_bytes(self.folder / "usage", most_bytes=_USAGE_DIGITS))
        except (OSError, ValueError):
            return sum(size for _, size, _ in self._entries())

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[int, str]]:
        with self._locked():  # Or it would be taken for a leftover before it is locked.
            descriptor, name = tempfile.mkstemp(dir=self._tmp)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield descriptor, name
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name)  # Gone already if it was published.
            with contextlib.suppress(OSError):  # A file server may refuse here; then the checksum does not fit.
                os.close(descriptor)

    def _publish(self, name: str, path: Path, size: int) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            usage = self.usage() + size
            with contextlib.suppress(FileNotFoundError):  # Another process may have stored the same meanwhile.
                known = path.stat().st_size
                path.unlink()
                usage = max(size, usage - known)
            # Counted before it is there: a crash between the two makes the count too high, and the next full
            # folder is counted anew.
            self._set_usage(usage)
            if usage > self.config.max_bytes:
                self._evict(size)
            os.replace(name, path)

    def _evict(self, incoming: int) -> None:
        """Removes what was used longest ago, until the folder has room. Called with the lock."""
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
        """(time of last use, bytes, path) of each entry."""
        for group in os.scandir(self.folder):
            if len(group.name) == 2 and group.is_dir():
                for entry in os.scandir(group.path):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        yield stat.st_mtime_ns, stat.st_size, Path(entry.path)

    def _drop_leftovers(self) -> None:
        """Removes temporary files whose writers are dead: nobody holds their lock. Called with the lock."""
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
        """A file of the folder that is made if absent and written in place."""
        return os.fdopen(regular_descriptor(self.folder / name, os.O_WRONLY | os.O_CREAT), "wb", buffering=0)

    def _set_usage(self, usage: int) -> None:
        # Too short to be torn by a kill: one write of a few bytes, always 20 of them.
        with self._open("usage") as file:
            file.write(b"%0*d" % (_USAGE_DIGITS, usage))


def _cause(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


def _fits(trailer: bytes, crc32: int, size: int) -> bool:
    return trailer == _TRAILER.pack(_MAGIC, crc32, size)
