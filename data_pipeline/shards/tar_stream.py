"""Samples of a tar that is read once from front to back: from a file, a pipe, a bucket or a web server.

    open_stream(source) --bytes--> stream_members --(name, content)--> stream_samples --> key, members

Needs no index and no second look, so it finds no checksum either: only a tar's own damage is noticed. Not for: picking
samples out of a tar (``index``).
"""

from __future__ import annotations

import io
import lzma
import subprocess
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from data_pipeline.errors import DataPipelineError, FaultKind, SampleError, ShardError
from data_pipeline.shards.tar_members import BLOCK_BYTES, split_name
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
    """Name and content of each file of a tar; compressed tars are unpacked on the way.

    Raises:
        ShardError: the tar is damaged or cut short, or holds a link, a device or a member that is too large.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for info in tar:
                if info.isdir():
                    continue
                if not info.isfile() or info.size > MAX_MEMBER_BYTES:
                    raise ShardError(f"{source}: {info.name!r}: no plain file, or larger than a member may be")
                file = tar.extractfile(info)
                assert file is not None
                content = file.read()
                if len(content) < info.size:
                    raise ShardError(f"{source}: ends inside of {info.name!r}")
                yield info.name.removeprefix("./"), content
                tar.members = []  # type: ignore[attr-defined] # Else every header is kept.
            _check_end(tar, source)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ShardError(f"{source}: damaged: {error}") from error


def _check_end(tar: tarfile.TarFile, source: str) -> None:
    """``tarfile`` takes a tar without an end mark for whole, and a damaged header for the end mark."""
    stream: Any = tar.fileobj
    if stream.tell() < tar.offset + BLOCK_BYTES:  # Of an end mark it would have read one block.
        raise ShardError(f"{source}: truncated: ends at byte {tar.offset} without an end mark")
    while chunk := stream.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise ShardError(f"{source}: data behind the end mark: the tar was damaged or joined")


def stream_samples(
    members: Iterable[tuple[str, T]], source: str
) -> Iterator[tuple[str, dict[str, T] | SampleError | ShardError]]:
    """Key and members of each sample, by webdataset's rule: neighbours with one key.

    Args:
        members: Name and content, or whatever stands for it, of each member.
        source: The tar's name, for messages.

    A sample with two members of one name is given as a ``SampleError``. Damage of the tar, or a server that fails, is
    the last thing given: as a ``ShardError``, under the key of the sample in hand, which may lack what comes behind.
    """
    key, found, problem = "", dict[str, T](), False
    try:
        for name, content in members:
            named = split_name(name)
            if named is None:
                continue
            if named[0] != key or not found:
                if found:
                    yield key, _twice(source, key) if problem else found
                key, found, problem = named[0], {}, False
            problem |= named[1] in found
            found[named[1]] = content
    except DataPipelineError as error:
        yield key or "?", _as_shard_error(error)
        return
    if found:
        yield key, _twice(source, key) if problem else found


def _twice(source: str, key: str) -> SampleError:
    return SampleError("two members with one extension", kind=FaultKind.DOCUMENT, shard=source, key=key)


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
