"""The manifest of a data set: its shards in order, as mapped columns.

    NAME.manifest:  cu_samples (N+1) | path bytes and offsets | tar bytes | tar sha256

Opening it costs milliseconds and no memory at a million shards, because nothing is turned into Python objects before it
is asked for. Paths are relative to the manifest's folder and never leave it, so a data set moves as a folder, to a
server too: of a remote data set manifest and indexes are mapped from the local cache.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import AbsentError, DataConfigError, ManifestError
from data_pipeline.io.columns import Column, Columns, check_offsets, pack_strings, read_columns, write_columns
from data_pipeline.shards.index import ShardIndex, index_url
from data_pipeline.shards.mistaken import refuse_no_manifest
from data_pipeline.storage.location import Url, parse_location
from data_pipeline.storage.storage import Storage

MANIFEST_FORMAT = "mmscale-manifest-1"
_COLUMNS = {
    "cu_samples": ("<i8", 1),
    "path_bytes": ("u1", 1),
    "cu_path_bytes": ("<i8", 1),
    "tar_bytes": ("<i8", 1),
    "tar_sha256": ("u1", 2),
}
_SHA256_BYTES = 32
# A look at a row maps much around each of its columns; with a million shards that would add up to 80 MiB.
_RELEASE_EVERY = 4


@dataclass(frozen=True)
class Manifest:
    """An ordered set of shards. Opened with ``Manifest.open``.

    Attributes:
        path: The file, or its URL.
        fingerprint: sha256 over the columns, hexadecimal: equal for equal data under equal names.
        cu_samples: int64 (num_shards + 1,): samples before each shard.
    """

    path: Path | Url
    fingerprint: str
    cu_samples: Column
    _columns: Columns = field(repr=False)
    _storage: Storage | None = field(repr=False, default=None)

    @classmethod
    def open(cls, path: str | Path, storage: Storage | None = None) -> Manifest:
        """Maps a manifest.

        Args:
            path: Its place: a file or a URL.
            storage: How a URL is read; None reads it as the environment says.

        Raises:
            ManifestError: it is missing or damaged.
            StorageError: a remote one cannot be read.
        """
        location = parse_location(path)
        if isinstance(location, Url):
            storage = storage if storage is not None else Storage.of_process()
            return storage.background.run(storage.mapped(location, lambda file: cls._map(file, location, storage)))
        return cls._map(location, location, None)

    @classmethod
    def _map(cls, file: Path, path: Path | Url, storage: Storage | None) -> Manifest:
        refuse_no_manifest(file, str(path))
        columns = read_columns(file, _COLUMNS, MANIFEST_FORMAT, str(path))
        arrays, record = columns.arrays, columns.record
        num_shards = len(arrays["cu_samples"]) - 1
        if num_shards < 0 or len(arrays["tar_bytes"]) != num_shards or len(arrays["cu_path_bytes"]) != num_shards + 1:
            raise ManifestError(f"{path}: damaged manifest: columns of unequal length")
        if arrays["tar_sha256"].shape != (num_shards, _SHA256_BYTES):
            raise ManifestError(f"{path}: damaged manifest: digests of shape {arrays['tar_sha256'].shape}")
        check_offsets(arrays["cu_samples"], int(arrays["cu_samples"][-1]), f"{path}: cu_samples")
        check_offsets(arrays["cu_path_bytes"], len(arrays["path_bytes"]), f"{path}: cu_path_bytes")
        columns.release_pages()
        return cls(path, str(record.get("fingerprint")), arrays["cu_samples"], columns, storage)

    @property
    def num_shards(self) -> int:
        return len(self.cu_samples) - 1

    @property
    def num_samples(self) -> int:
        return self._starts[-1]

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(shard number, index inside that shard) of a sample.

        Raises:
            IndexError: ``sample_index`` is not in ``range(num_samples)``.
        """
        if not 0 <= sample_index < self._starts[-1]:
            raise IndexError(f"sample {sample_index} of {self.num_samples} in {self.path}")
        shard = bisect_right(self._starts, sample_index) - 1
        return shard, sample_index - self._starts[shard]

    @cached_property
    def _starts(self) -> memoryview:
        """``cu_samples`` for single numbers: a memoryview gives a Python integer in a third of numpy's time."""
        return self.cu_samples.data

    @cached_property
    def is_remote(self) -> bool:
        """Whether the data set lies on a server."""
        return self._storage is not None

    @property
    def storage(self) -> Storage:
        """What reads the remote objects of this data set."""
        assert self._storage is not None, "a local data set has no storage"
        return self._storage

    @property
    def file(self) -> Path:
        """The manifest, for a caller that needs its data set on this machine.

        Raises:
            DataConfigError: it lies on a server.
        """
        if isinstance(self.path, Url):
            raise DataConfigError(f"{self.path}: this needs a data set on this machine; copy it to a disk first")
        return self.path

    def shard_path(self, shard_number: int) -> Path:
        """Path of a shard, for a caller that needs a file.

        Raises:
            ManifestError: the stored path would leave the manifest's folder.
            DataConfigError: the shards lie on a server.
        """
        location = self.shard_location(shard_number)
        if isinstance(location, Url):
            raise DataConfigError(f"{location}: this needs the shard as a file; copy the data set to a disk first")
        return location

    def shard_location(self, shard_number: int) -> Path | Url:
        """Path of a shard, or its URL.

        Raises:
            ManifestError: the stored path would leave the manifest's folder.
        """
        if shard_number % _RELEASE_EVERY == 0:  # Orders visit shards at random: about once in so many calls.
            self._columns.release_pages()
        arrays = self._columns.arrays
        first, end = arrays["cu_path_bytes"][shard_number : shard_number + 2]
        name = bytes(arrays["path_bytes"][first:end]).decode(errors="replace")
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in name or "\\" in name or not relative.parts:
            raise ManifestError(
                f"{self.path}: shard {shard_number} has the path {name!r}, outside the manifest's folder"
            )
        return self.path.parent.child(name) if isinstance(self.path, Url) else self.path.parent / relative

    def find_shards(self, name: str) -> list[int]:
        """Numbers of the shards whose last part of the path is ``name``; no path is made into an object."""
        arrays = self._columns.arrays
        ends = arrays["cu_path_bytes"][1:]
        found = []
        paths, wanted = arrays["path_bytes"].tobytes(), name.encode()
        at = paths.find(wanted)
        while at >= 0:
            number = int(np.searchsorted(ends, at, side="right"))
            begins = at == arrays["cu_path_bytes"][number] or paths[at - 1 : at] == b"/"
            if begins and at + len(wanted) == ends[number]:
                found.append(number)
            at = paths.find(wanted, at + 1)
        return found

    def shard_bytes(self, shard_number: int) -> int:
        """Size of a shard's tar."""
        return int(self._columns.arrays["tar_bytes"][shard_number])

    def shard_sha256(self, shard_number: int) -> str:
        """Digest of a shard's tar, hexadecimal."""
        return bytes(self._columns.arrays["tar_sha256"][shard_number]).hex()

    def open_index(self, shard_number: int) -> ShardIndex:
        """Opens a shard's index and checks that both speak of the same tar.

        Raises:
            ManifestError: shard or index is missing or stale, or the tar is not the one that the manifest knows.
        """
        location = self.shard_location(shard_number)
        if isinstance(location, Url):
            return self.storage.background.run(self.fetch_index(shard_number))
        index = ShardIndex.open(location)
        self._check(index, shard_number)
        return index

    async def fetch_index(self, shard_number: int) -> ShardIndex:
        """``open_index`` of a remote data set, for coroutines; from the cache if it was fetched before.

        Raises:
            ManifestError: the index is missing, damaged or of another tar.
            StorageError: it cannot be read.
        """
        location, storage = self.shard_location(shard_number), self.storage
        assert isinstance(location, Url), "shards lie where their manifest lies"
        url, identity = index_url(location), f"of {self.shard_sha256(shard_number)}"

        def use(file: Path) -> ShardIndex:
            index = ShardIndex.map(file, location)
            self._check(index, shard_number)
            return index

        try:
            return await storage.mapped(url, use, identity)
        except AbsentError as error:
            raise ManifestError(
                f"shard {location} has no index beside it; build it with: mmscale data index --manifest {self.path}"
            ) from error
        except ManifestError:
            storage.forget(url, identity)  # It may be replaced by a good one.
            raise

    def _check(self, index: ShardIndex, shard_number: int) -> None:
        num_samples = int(self.cu_samples[shard_number + 1] - self.cu_samples[shard_number])
        if len(index) != num_samples or index.tar_sha256 != self.shard_sha256(shard_number):
            raise ManifestError(
                f"shard {index.tar_path} changed since {self.path} was made "
                f"({len(index)} samples, {num_samples} expected); "
                f"renew it with: mmscale data index --manifest {self.path}"
            )

    def read_index(self, shard_number: int) -> ShardIndex:
        """A shard's index without a look at the tar, which may be gone.

        Raises:
            ManifestError: the index is missing or damaged, or speaks of another tar than the manifest.
            StorageError: it lies on a server and cannot be read.
        """
        location = self.shard_location(shard_number)
        if isinstance(location, Url):
            return self.open_index(shard_number)  # It does not look at the tar either.
        index = ShardIndex.read(location)
        self._check(index, shard_number)
        return index

    def computed_fingerprint(self) -> str:
        """The fingerprint computed again from the columns; differs from ``fingerprint`` in a damaged file."""
        return _fingerprint(self._columns.arrays)


def _fingerprint(arrays: dict[str, Column]) -> str:
    digest = hashlib.sha256(MANIFEST_FORMAT.encode())
    for name in sorted(_COLUMNS):
        digest.update(f"{name}:{arrays[name].shape};".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data if arrays[name].size else b"")
    return digest.hexdigest()


def write_manifest(path: str | Path, shards: Iterable[str | Path]) -> Manifest:
    """Writes a manifest of indexed shards, whole or not at all; equal shards give equal bytes.

    One index is open at a time, and a shard costs a few hundred bytes of memory.

    Args:
        path: The manifest; shards must lie in its folder or below.
        shards: Tars in the order that sample numbers follow.

    Raises:
        DataConfigError: a shard lies outside the manifest's folder, or is named twice.
        ManifestError: a shard or its index is missing or stale.
    """
    path = Path(path)
    write_entries(path, (_entry(Path(shard), path) for shard in shards))
    return Manifest.open(path)


class Entry(NamedTuple):
    """What a manifest says of a shard; the name is relative to the manifest's folder."""

    name: str
    num_samples: int
    tar_bytes: int
    tar_sha256: str


def _entry(shard: Path, manifest: Path) -> Entry:
    name, index = _relative(shard, manifest), ShardIndex.open(shard)
    return Entry(name, len(index), index.tar_bytes, index.tar_sha256)


def write_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a manifest of shards of which all is known, whole or not at all.

    Raises:
        DataConfigError: a shard is named twice.
    """
    names: dict[str, None] = {}
    counts, tar_bytes, digests = array("q", [0]), array("q"), bytearray()
    for entry in entries:
        if entry.name in names:
            raise DataConfigError(f"{path}: the shard {entry.name} is named twice")
        names[entry.name] = None
        counts.append(entry.num_samples)
        tar_bytes.append(entry.tar_bytes)
        digests += bytes.fromhex(entry.tar_sha256)
    path_bytes, cu_path_bytes = pack_strings(names)
    arrays: dict[str, Column] = {
        "cu_samples": np.cumsum(counts, dtype=np.int64),
        "path_bytes": path_bytes,
        "cu_path_bytes": cu_path_bytes,
        "tar_bytes": np.array(tar_bytes, np.int64),
        "tar_sha256": np.frombuffer(digests, np.uint8).reshape(-1, _SHA256_BYTES),
    }
    write_columns(path, arrays, {"format": MANIFEST_FORMAT, "fingerprint": _fingerprint(arrays)})


def _relative(shard: Path, manifest: Path) -> str:
    # absolute(), not resolve(): a shard may be a link to another disk, its name is what counts.
    try:
        relative = shard.absolute().relative_to(manifest.parent.absolute())
    except ValueError as error:
        raise DataConfigError(
            f"{shard} does not lie below {manifest.parent.absolute()}, the manifest's folder"
        ) from error
    if ".." in relative.parts:
        raise DataConfigError(f"{shard}: write the path without '..'")
    return relative.as_posix()
