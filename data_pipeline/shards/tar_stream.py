"""Samples of a tar that is read once from front to back: from a file, a pipe, a bucket or a web server.

    open_stream(source) --bytes--> stream_members --(name, content)--> stream_samples --> key, members

It needs no index and no second look, so it finds no checksum of a member: it notices damage of the tar's headers and,
where the tar is compressed, whatever the checksum of the compression shows. Not for: picking samples out of a tar
(``index``).
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
from data_pipeline.shards.tar_members import BLOCK_BYTES, Attributes, parse_entry, split_name
from data_pipeline.storage.location import parse_location
from data_pipeline.storage.storage import Storage

PIPE = "pipe:"
MAX_MEMBER_BYTES = 1 << 30
"""A larger member is refused, so that a hostile header cannot take all memory."""

T = TypeVar("T")
Members = dict[str, bytes]
"""Content by extension."""


@contextmanager
def open_stream(source: str, storage: Storage) -> Iterator[IO[bytes]]:
    """The bytes of ``source``, front to back.

    Args:
        source: A path, a URL, or ``pipe:`` and a shell command that writes the tar to its output.
        storage: Reads URLs.

    Raises:
        ShardError: it cannot be opened, or the command fails. A command is stopped when the block ends before it does.
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
        if not process.stdout.read(1):  # Read to its end: now its word on whether that was all counts.
            code = process.wait()
            if code:
                raise ShardError(f"{source}: the command ended with code {code}")
    finally:
        process.stdout.close()
        if process.poll() is None:
            process.kill()
        process.wait()


class _Chunks(io.RawIOBase):
    """An iterator of byte chunks as a file."""

    def __init__(self, chunks: Iterator[bytes], source: str) -> None:
        self._chunks, self._source, self._rest = chunks, source, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed and isinstance(self._chunks, Iterator) and hasattr(self._chunks, "close"):
            self._chunks.close()
        super().close()


def stream_members(stream: IO[bytes], source: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of a tar; a tar packed with gzip, bzip2 or xz is unpacked on the way.

    Raises:
        ShardError: the tar is damaged or cut short, or holds a link, a device or a member that is too large. What a
            packed tar's own checksum shows is found at its end, behind the last member.
    """
    try:
        reader, attributes = _Blocks(_unpacked(stream), source), Attributes()
        while True:
            at, block = reader.at, reader.read(BLOCK_BYTES)
            entry = parse_entry(block, reader.read, at, source, attributes, most_bytes=MAX_MEMBER_BYTES)
            if entry is None:
                break
            if entry.member is not None:
                yield entry.member.name, reader.read(entry.member.size, entry.member.name)
            reader.read(entry.following - reader.at)
        reader.check_rest()
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{source}: damaged: {error}") from error


def _unpacked(stream: IO[bytes]) -> IO[bytes]:
    """The tar's own bytes. These readers check what is packed against its checksum, when they come to its end."""
    buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    start = buffered.peek(8)[:8]
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if start.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(buffered))
    return cast(IO[bytes], lzma.LZMAFile(buffered) if start.startswith((b"\xfd7zXZ", b"\x5d\0\0\x80")) else buffered)


class _Blocks:
    """A stream and how much of it was read."""

    def __init__(self, stream: IO[bytes], source: str) -> None:
        self._stream, self._source, self.at = stream, source, 0

    def read(self, num_bytes: int, name: str = "") -> bytes:
        """Exactly so many bytes: of the member ``name``, or of headers and what pads them."""
        data = self._stream.read(num_bytes)
        if len(data) < num_bytes:
            where = f"inside of {name!r}" if name else "without an end mark"
            raise ShardError(f"{self._source}: truncated: ends at byte {self.at + len(data)} {where}")
        self.at += num_bytes
        return data

    def check_rest(self) -> None:
        """Reads what follows the end mark: a damaged header would be taken for one."""
        while chunk := self._stream.read(1 << 20):
            if chunk.count(0) != len(chunk):
                raise ShardError(f"{self._source}: data behind the end mark: the tar was damaged or joined")


def stream_samples(
    members: Iterable[tuple[str, T]], source: str
) -> Iterator[tuple[str, dict[str, T] | SampleError | ShardError]]:
    """Yield the key and the members of each sample, grouped by webdataset: neighbours with one key.

    Args:
        members: Name and content, or whatever stands for it, of each member.
        source: The tar's name, for messages.

    A sample with two members of one name, or whose key came before, is given as a ``SampleError``. Damage of the tar,
    or a server that fails, is the last thing given: as a ``ShardError``, under the key of the sample in hand, which may
    lack its last members.
    """
    from webdataset.tariterators import group_by_keys  # It imports torch, which takes seconds.

    seen = set[str]()  # A key costs less memory here than its member costs in the tar.
    doubled, failed = list[Exception](), list[ShardError]()

    def files() -> Iterator[dict[str, Any]]:
        try:
            for name, content in members:
                yield {"fname": name, "data": content, "__url__": source}
        except DataPipelineError as error:  # Keep it: ``group_by_keys`` still yields the sample in hand.
            failed.append(_as_shard_error(error))

    def note(error: Exception) -> bool:
        doubled.append(error)
        return True

    key = "?"
    for sample in group_by_keys(files(), keys=_dotted_name, handler=note):
        key = sample["__key__"]
        if failed:
            break
        if doubled:
            doubled.clear()
            yield key, _refused("two members with one extension", source, key)
        elif key in seen:
            yield key, _refused(f"{source}: the key {key!r} comes a second time", source, key)
        else:
            yield key, {ext[1:]: content for ext, content in sample.items() if ext.startswith(".")}
        seen.add(key)
    if failed:
        yield key, failed[0]


def _dotted_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Return key and extension; a dot before the extension keeps it apart from webdataset's own ``__key__``."""
    named = split_name(name)
    return (None, None) if named is None else (named[0], f".{named[1]}")


def _refused(problem: str, source: str, key: str) -> SampleError:
    return SampleError(problem, kind=FaultKind.DOCUMENT, shard=source, key=key)


def samples_of(source: str, storage: Storage) -> Iterator[tuple[str, Members | SampleError | ShardError]]:
    """``stream_samples`` of a source, opened when the first is asked for and closed behind the last."""
    try:
        with open_stream(source, storage) as stream:
            yield from stream_samples(stream_members(stream, source), source)
    except DataPipelineError as error:  # It could not be opened, or its command failed behind the last sample.
        yield "?", _as_shard_error(error)


def _as_shard_error(error: DataPipelineError) -> ShardError:
    """What a store says of an object, as what the fault policy knows."""
    return error if isinstance(error, ShardError) else ShardError(str(error))
