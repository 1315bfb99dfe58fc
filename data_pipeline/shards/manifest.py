"""The manifest of a data set: its shards in order, as memory-mapped columns.

    NAME.manifest:  cu_samples (N+1) | path bytes and offsets | tar bytes | tar sha256

Opening a manifest of a million shards takes milliseconds and almost no memory, because rows become Python objects only
when they are read. Shard paths are relative to the manifest's folder and must stay inside it, so you can move or upload
the whole folder. The manifest and the indexes of a remote data set are mapped from the local cache.
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
from data_pipeline.shards.manifest_check import reject_non_manifest
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
# Reading a row maps surrounding memory pages of each column: 80 MiB in all with a million shards. Release them every
# few shards.
_RELEASE_EVERY = 4


@dataclass(frozen=True)
class Manifest:
    """An ordered list of shards, created by ``Manifest.open``.

    Attributes:
        path: Path or URL of the manifest.
        fingerprint: SHA-256 of the columns, hexadecimal. Equal data with equal shard names give equal fingerprints.
        cu_samples: int64 (num_shards + 1,): number of samples before each shard, then the total.
        image_tokenizer: SHA-256 of the image tokenizer of the samples' token grids; None if the data set has no grids.
    """

    path: Path | Url
    fingerprint: str
    cu_samples: Column
    image_tokenizer: str | None
    _columns: Columns = field(repr=False)
    _storage: Storage | None = field(repr=False, default=None)

    @classmethod
    def open(cls, path: str | Path, storage: Storage | None = None) -> Manifest:
        """Map a manifest.

        Args:
            path: Path or URL.
            storage: Reads a URL. None uses ``Storage.of_process()``, configured by environment variables.

        Raises:
            ManifestError: the manifest is missing or damaged, or the file is no manifest.
            StorageError: a remote manifest cannot be read.
        """
        location = parse_location(path)
        if isinstance(location, Url):
            storage = storage if storage is not None else Storage.of_process()
            return storage.background.run(storage.map_cached(location, lambda file: cls._map(file, location, storage)))
        return cls._map(location, location, None)

    @classmethod
    def _map(cls, file: Path, path: Path | Url, storage: Storage | None) -> Manifest:
        reject_non_manifest(file, str(path))
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
        tokenizer = record.get("image_tokenizer")
        if not isinstance(tokenizer, str | None):
            raise ManifestError(f"{path}: damaged manifest: the image tokenizer is {tokenizer!r:.80}")
        return cls(path, str(record.get("fingerprint")), arrays["cu_samples"], tokenizer, columns, storage)

    @property
    def num_shards(self) -> int:
        return len(self.cu_samples) - 1

    @property
    def num_samples(self) -> int:
        return self._starts[-1]

    def locate(self, sample_index: int) -> tuple[int, int]:
        """Return (shard number, index inside that shard) of a sample.

        Raises:
            IndexError: ``sample_index`` is not in ``range(num_samples)``.
        """
        if not 0 <= sample_index < self._starts[-1]:
            raise IndexError(f"sample {sample_index} of {self.num_samples} in {self.path}")
        shard = bisect_right(self._starts, sample_index) - 1
        return shard, sample_index - self._starts[shard]

    @cached_property
    def _starts(self) -> memoryview:
        """``cu_samples`` as a memoryview, which returns a Python integer in a third of numpy's time."""
        return self.cu_samples.data

    @cached_property
    def is_remote(self) -> bool:
        """Whether the manifest was opened by URL."""
        return self._storage is not None

    @property
    def storage(self) -> Storage:
        """The storage that reads the objects of a remote data set. Must not be called for a local one."""
        assert self._storage is not None, "a local data set has no storage"
        return self._storage

    @property
    def file(self) -> Path:
        """Path of the manifest, for callers that need a local data set.

        Raises:
            DataConfigError: the manifest is remote.
        """
        if isinstance(self.path, Url):
            raise DataConfigError(f"{self.path}: this operation needs a local data set; copy it to a disk first")
        return self.path

    def shard_path(self, shard_number: int) -> Path:
        """Return the path of a shard, for callers that need a local file.

        Raises:
            ManifestError: the stored path is outside the manifest's folder.
            DataConfigError: the shards are remote.
        """
        location = self.shard_location(shard_number)
        if isinstance(location, Url):
            raise DataConfigError(f"{location}: this operation needs a local shard; copy the data set to a disk first")
        return location

    def shard_location(self, shard_number: int) -> Path | Url:
        """Return the path or URL of a shard.

        Raises:
            ManifestError: the stored path is outside the manifest's folder.
        """
        if shard_number % _RELEASE_EVERY == 0:  # Shards are visited in random order, so this spreads over the calls.
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
        """Return the numbers of the shards whose file name is ``name``, found without decoding all paths."""
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
        """Return the size of a shard's tar, as recorded in the manifest."""
        return int(self._columns.arrays["tar_bytes"][shard_number])

    def shard_sha256(self, shard_number: int) -> str:
        """Return the SHA-256 of a shard's tar, as recorded in the manifest, hexadecimal."""
        return bytes(self._columns.arrays["tar_sha256"][shard_number]).hex()

    def open_index(self, shard_number: int) -> ShardIndex:
        """Open a shard's index and check that it and the manifest describe the same tar.

        The size and the modification time of a local tar are checked too (``ShardIndex.open``); a remote tar is not.

        Raises:
            ManifestError: the shard or its index is missing, the index is damaged or stale, or the manifest describes
                another tar.
            StorageError: a remote index cannot be read.
        """
        location = self.shard_location(shard_number)
        if isinstance(location, Url):
            return self.storage.background.run(self.fetch_index(shard_number))
        index = ShardIndex.open(location)
        self._check(index, shard_number)
        return index

    async def fetch_index(self, shard_number: int) -> ShardIndex:
        """Coroutine form of ``open_index`` for a remote data set; reads the index from the cache if possible.

        Raises:
            ManifestError: the index is missing or damaged, or describes another tar.
            StorageError: the index cannot be read.
        """
        location, storage = self.shard_location(shard_number), self.storage
        assert isinstance(location, Url), "the shards of a remote manifest are remote"
        url, identity = index_url(location), f"of {self.shard_sha256(shard_number)}"

        def open_file(file: Path) -> ShardIndex:
            index = ShardIndex.map(file, location)
            self._check(index, shard_number)
            return index

        try:
            return await storage.map_cached(url, open_file, identity)
        except AbsentError as error:
            raise ManifestError(
                f"shard {location} has no index; build it with: mmscale data index --manifest {self.path}"
            ) from error
        except ManifestError:
            storage.forget(url, identity)  # A later call fetches it again, in case the server has a good one by then.
            raise

    def _check(self, index: ShardIndex, shard_number: int) -> None:
        num_samples = int(self.cu_samples[shard_number + 1] - self.cu_samples[shard_number])
        if len(index) != num_samples or index.tar_sha256 != self.shard_sha256(shard_number):
            raise ManifestError(
                f"shard {index.tar_path} changed since {self.path} was written "
                f"({len(index)} samples, {num_samples} expected); "
                f"update it with: mmscale data index --manifest {self.path}"
            )

    def read_index(self, shard_number: int) -> ShardIndex:
        """Return a shard's index without accessing the tar, which may be missing.

        Raises:
            ManifestError: the index is missing or damaged, or describes another tar than the manifest.
            StorageError: a remote index cannot be read.
        """
        location = self.shard_location(shard_number)
        if isinstance(location, Url):
            return self.open_index(shard_number)  # For a remote data set, ``open_index`` does not access the tar.
        index = ShardIndex.read(location)
        self._check(index, shard_number)
        return index

    def computed_fingerprint(self) -> str:
        """Return the fingerprint recomputed from the columns. In a damaged file it differs from ``fingerprint``."""
        return _fingerprint(self._columns.arrays, self.image_tokenizer)


def _fingerprint(arrays: dict[str, Column], image_tokenizer: str | None) -> str:
    digest = hashlib.sha256(MANIFEST_FORMAT.encode())
    digest.update(b"" if image_tokenizer is None else f"image_tokenizer:{image_tokenizer};".encode())
    for name in sorted(_COLUMNS):
        digest.update(f"{name}:{arrays[name].shape};".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data if arrays[name].size else b"")
    return digest.hexdigest()


def write_manifest(path: str | Path, shards: Iterable[str | Path], image_tokenizer: str | None = None) -> Manifest:
    """Write a manifest of indexed shards atomically. Equal shards with equal names give byte-identical manifests.

    Memory use is a few hundred bytes a shard, because only one index is open at a time.

    Args:
        path: Path of the manifest.
        shards: Tars in the manifest's folder or below it. Samples are numbered in this order.
        image_tokenizer: SHA-256 of the image tokenizer of the samples' token grids; None without grids.

    Raises:
        DataConfigError: a shard is outside the manifest's folder, or is listed twice.
        ManifestError: a shard or its index is missing, or the index is damaged or stale.
    """
    path = Path(path)
    write_entries(path, (_entry(Path(shard), path) for shard in shards), image_tokenizer)
    return Manifest.open(path)


class ShardEntry(NamedTuple):
    """The manifest entry of a shard; ``name`` is its path relative to the manifest's folder."""

    name: str
    num_samples: int
    tar_bytes: int
    tar_sha256: str


def _entry(shard: Path, manifest: Path) -> ShardEntry:
    name, index = _relative(shard, manifest), ShardIndex.open(shard)
    return ShardEntry(name, len(index), index.tar_bytes, index.tar_sha256)


def write_entries(path: Path, entries: Iterable[ShardEntry], image_tokenizer: str | None = None) -> None:
    """Write a manifest atomically from entries, without reading the shards; as ``write_manifest``.

    Raises:
        DataConfigError: a shard is listed twice.
    """
    names: dict[str, None] = {}
    counts, tar_bytes, digests = array("q", [0]), array("q"), bytearray()
    for entry in entries:
        if entry.name in names:
            raise DataConfigError(f"{path}: the shard {entry.name} is listed twice")
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
    record = {"format": MANIFEST_FORMAT, "fingerprint": _fingerprint(arrays, image_tokenizer)}
    write_columns(path, arrays, record | ({} if image_tokenizer is None else {"image_tokenizer": image_tokenizer}))


def _relative(shard: Path, manifest: Path) -> str:
    # absolute(), not resolve(): if a shard is a symbolic link to another disk, the manifest stores the link's name.
    try:
        relative = shard.absolute().relative_to(manifest.parent.absolute())
    except ValueError as error:
        raise DataConfigError(f"{shard} is not below {manifest.parent.absolute()}, the manifest's folder") from error
    if ".." in relative.parts:
        raise DataConfigError(f"{shard}: expected a path without '..'")
    return relative.as_posix()
