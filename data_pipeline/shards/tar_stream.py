"""Read the samples of a tar sequentially from a file, a pipe, a bucket or a web server, without an index.

    open_stream(source) --bytes--> stream_members --(name, content)--> stream_samples --> key, members

Without an index there are no checksums of members. Only damaged headers are detected and, in a compressed tar,
everything that the checksum of the compression covers. ``sample_reader`` reads single samples of an indexed tar.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

from data_pipeline.errors import DataPipelineError, FaultKind, SampleError, ShardError
from data_pipeline.shards.tar_members import BLOCK_BYTES, Attributes, parse_header, split_name
from data_pipeline.storage.location import parse_location
from data_pipeline.storage.storage import Storage

PIPE = "pipe:"
MAX_MEMBER_BYTES = 1 << 30
"""A larger member raises, so that a hostile header cannot exhaust memory."""

T = TypeVar("T")
Members = dict[str, bytes]
"""Content of a sample's members, by extension."""


@contextmanager
def open_stream(source: str, storage: Storage) -> Iterator[IO[bytes]]:
    """Open ``source`` for sequential reading.

    Args:
        source: A path, a URL, or ``pipe:`` followed by a shell command that writes the tar to its standard output.
        storage: Reads paths and URLs.

    Raises:
        ShardError: the command exits with an error after all of its output was read. A command that is still running
            at the end of the ``with`` block is killed.
        DataConfigError: the URL is malformed, or the extra ``remote`` is not installed.
        StorageError: the store failed, also while the caller reads.
    """
    if source.startswith(PIPE):
        with _piped(source.removeprefix(PIPE), source) as stream:
            yield stream
        return
    location = parse_location(source)
    chunks = storage.store(location).stream(location)
    yield io.BufferedReader(_Chunks(chunks, source), buffer_size=1 << 20)


@contextmanager
def _piped(command: str, source: str) -> Iterator[IO[bytes]]:
    process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout
        # If the output was read to its end, the exit code decides whether it is complete.
        if not process.stdout.read(1):
            code = process.wait()
            if code:
                raise ShardError(f"{source}: the command failed with exit code {code}")
    finally:
        process.stdout.close()
        if process.poll() is None:
            process.kill()
        process.wait()


class _Chunks(io.RawIOBase):
    """A readable file over an iterator of byte chunks."""

    def __init__(self, chunks: Iterator[bytes], source: str) -> None:
        self._chunks, self._source, self._unread = chunks, source, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unread:
            try:
                self._unread = memoryview(next(self._chunks))
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._unread))
        buffer[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count

    def close(self) -> None:
        if not self.closed and isinstance(self._chunks, Iterator) and hasattr(self._chunks, "close"):
            self._chunks.close()
        super().close()


def stream_members(stream: IO[bytes], source: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of a tar. A tar compressed with gzip, bzip2 or xz is decompressed.

    Raises:
        ShardError: the tar is damaged or truncated, or contains a link, a device or a member above
            ``MAX_MEMBER_BYTES``. A wrong checksum of a compressed tar may be found only after all members were yielded.
    """
    try:
        reader, attributes = _CountingReader(_decompressed(stream), source), Attributes()
        while True:
            at, block = reader.at, reader.read(BLOCK_BYTES)
            header = parse_header(block, reader.read, at, source, attributes, most_bytes=MAX_MEMBER_BYTES)
            if header is None:
                break
            if header.member is not None:
                yield header.member.name, reader.read(header.member.size, header.member.name)
            reader.read(header.following - reader.at)
        reader.check_rest()
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{source}: damaged: {error}") from error


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    """Return a stream of the uncompressed tar. The decompressors raise at the end if the checksum does not match."""
    buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    start = buffered.peek(8)[:8]
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if start.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(buffered))
    return cast(IO[bytes], lzma.LZMAFile(buffered) if start.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")) else buffered)


class _CountingReader:
    """Reads exact numbers of bytes and counts them in ``at``."""

    def __init__(self, stream: IO[bytes], source: str) -> None:
        self._stream, self._source, self.at = stream, source, 0

    def read(self, num_bytes: int, name: str = "") -> bytes:
        """Return exactly ``num_bytes``; raise ``ShardError``, naming the member ``name``, if the stream ends first."""
        data = self._stream.read(num_bytes)
        if len(data) < num_bytes:
            where = f"inside {name!r}" if name else "without an end mark"
            raise ShardError(f"{self._source}: truncated: ends at byte {self.at + len(data)} {where}")
        self.at += num_bytes
        return data

    def check_rest(self) -> None:
        """Raise if there is data after the end mark, because a header damaged to zeros looks like an end mark."""
        while chunk := self._stream.read(1 << 20):
            if chunk.count(0) != len(chunk):
                raise ShardError(f"{self._source}: data after the end mark: the tar was damaged or joined")


def stream_samples(
    members: Iterable[tuple[str, T]], source: str
) -> Iterator[tuple[str, dict[str, T] | SampleError | ShardError]]:
    """Yield (key, members) of each sample. webdataset groups consecutive members with equal keys.

    Errors are yielded instead of raised. A ``SampleError`` replaces a sample with two members of one extension, or with
    a key that occurred before. If reading fails, the last item is a ``ShardError`` with the key of the current sample
    (``?`` if there is none). The members of that sample are not yielded, because some may be missing.

    Args:
        members: (name, content) of each member; the content may be any object.
        source: The tar's name in messages.
    """
    from webdataset.tariterators import group_by_keys  # Imported here because it imports torch, which takes seconds.

    seen = set[str]()  # Grows with the tar, but a key needs less memory than its members' headers need in the tar.
    duplicates, failed = list[Exception](), list[ShardError]()

    def files() -> Iterator[dict[str, Any]]:
        try:
            for name, content in members:
                yield {"fname": name, "data": content, "__url__": source}
        except DataPipelineError as error:  # Keep the error until ``group_by_keys`` has yielded the current sample.
            failed.append(_as_shard_error(error))

    def record_duplicate(error: Exception) -> bool:
        duplicates.append(error)
        return True

    key = "?"
    for sample in group_by_keys(files(), keys=_dotted_name, handler=record_duplicate):
        key = sample["__key__"]
        if failed:
            break
        if duplicates:
            duplicates.clear()
            yield key, _sample_error("two members with one extension", source, key)
        elif key in seen:
            yield key, _sample_error(f"{source}: the key {key!r} comes a second time", source, key)
        else:
            yield key, {ext[1:]: content for ext, content in sample.items() if ext.startswith(".")}
        seen.add(key)
    if failed:
        yield key, failed[0]


def _dotted_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Return key and extension. The leading dot of the extension distinguishes it from webdataset's ``__key__``."""
    named = split_name(name)
    return (None, None) if named is None else (named[0], f".{named[1]}")


def _sample_error(problem: str, source: str, key: str) -> SampleError:
    return SampleError(problem, kind=FaultKind.DOCUMENT, shard=source, key=key)


def samples_of(source: str, storage: Storage) -> Iterator[tuple[str, Members | SampleError | ShardError]]:
    """Yield the items of ``stream_samples`` for a source.

    If the source cannot be opened, or its command fails, the last item is a ``ShardError`` with the key ``?``.
    """
    try:
        with open_stream(source, storage) as stream:
            yield from stream_samples(stream_members(stream, source), source)
    except DataPipelineError as error:  # Opening failed, or the command failed after the last sample.
        yield "?", _as_shard_error(error)


def _as_shard_error(error: DataPipelineError) -> ShardError:
    """Convert an error of a store to the type that the fault policy handles."""
    return error if isinstance(error, ShardError) else ShardError(str(error))
