"""A shard that is open for reading: the bytes of a local tar or of a remote one behind one method.

Not for: order, samples (``sample_reader``), remote access itself (``storage``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import AbsentError, ShardError, StaleError
from data_pipeline.io.untrusted import regular_descriptor
from data_pipeline.shards.index import Member, ShardIndex, extent
from data_pipeline.shards.manifest import Manifest
from data_pipeline.storage.background import Background
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import RemoteObject
from data_pipeline.storage.ranges import Range


class OpenShard(Protocol):
    """Bytes and index of one shard."""

    index: ShardIndex

    def read(self, first: int, end: int, *, fresh: bool = False) -> bytes:
        """Bytes [first, end) of the tar.

        Args:
            first: First byte.
            end: Behind the last one.
            fresh: Passes by copies of them, for a caller who found them wrong.

        Raises:
            ShardError: the tar is missing, unreadable, replaced or too short.
            StorageError: the server refused, or failed for too long: no fault of this shard.
        """
        ...

    def read_members(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """Bytes of all members of a sample, by extension; the rest as ``read``."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class LocalShard:
    """A file descriptor and the index of one shard."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.path = path
        self.index = index
        try:
            self._descriptor = regular_descriptor(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{path}: cannot be opened: {error.strerror}") from error

    def read(self, first: int, end: int, *, fresh: bool = False) -> bytes:
        """As ``OpenShard.read``."""
        try:
            data = os.pread(self._descriptor, end - first, first)
            while len(data) < end - first:  # One pread returns at most 2 GiB.
                more = os.pread(self._descriptor, end - first - len(data), first + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise ShardError(f"{self.path}: reading bytes {first}-{end} failed: {error.strerror}") from error
        if len(data) < end - first:
            raise ShardError(
                f"{self.path}: ends at byte {first + len(data)}, a sample reaches to {end}: the shard was truncated; "
                "restore it, or index it again"
            )
        return data

    def read_members(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """As ``OpenShard.read_members``. A call more for each costs less than to copy an image out of the whole."""
        return {member.ext: self.read(member.offset, member.offset + member.size) for member in members}

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class RemoteShard:
    """A remote tar and its index."""

    def __init__(self, remote: RemoteObject, index: ShardIndex, background: Background) -> None:
        self.remote = remote
        self.index = index
        self._background = background

    def read(self, first: int, end: int, *, fresh: bool = False) -> bytes:
        """As ``OpenShard.read``."""
        with shard_errors():
            return self._background.run(self.remote.read([Range(first, end)], fresh=fresh))[0]

    def read_members(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """As ``OpenShard.read_members``, in one request."""
        return cut_members(members, self.read(*extent(members), fresh=fresh))

    def close(self) -> None:
        """Nothing is held."""


def cut_members(members: Sequence[Member], data: bytes) -> dict[str, bytes]:
    """Bytes of each member, by extension, out of those from the first to the last."""
    first = members[0].offset
    return {member.ext: data[member.offset - first : member.offset - first + member.size] for member in members}


@contextlib.contextmanager
def shard_errors() -> Iterator[None]:
    """Says of a remote object that is gone or another one what is said of such a file: the shard is at fault.

    A server that refuses or fails is another matter: whatever it holds, the run ends and can be resumed.
    """
    try:
        yield
    except (AbsentError, StaleError) as error:
        raise ShardError(str(error)) from error


def open_shard(manifest: Manifest, number: int) -> OpenShard:
    """Opens a shard of a manifest, wherever it lies.

    Raises:
        ManifestError: its index is missing, stale or damaged.
        ShardError: it is missing or cannot be read.
        StorageError: the server refused, or failed for too long.
    """
    location = manifest.shard_location(number)
    if isinstance(location, Url):
        with shard_errors():
            return manifest.storage.background.run(open_remote(manifest, number))
    return LocalShard(location, manifest.open_index(number))


async def open_remote(manifest: Manifest, number: int) -> RemoteShard:
    """``open_shard`` of a remote manifest, for coroutines.

    Raises:
        ManifestError, StorageError: as ``Manifest.fetch_index``.
    """
    location, storage = manifest.shard_location(number), manifest.storage
    assert isinstance(location, Url), "shards lie where their manifest lies"
    index = await manifest.fetch_index(number)
    remote = storage.remote_object(location, manifest.shard_bytes(number), manifest.shard_sha256(number))
    return RemoteShard(remote, index, storage.background)
