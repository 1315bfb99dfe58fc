"""Read existing data sets as a source for new shards: resized, joined, filtered or shuffled.

    manifests --order, keep and exclude lists--> rows (set, sample) --any process--> members as stored --> ``ingest``

Members are copied unchanged after a check of their crc32; their content is not validated. A shuffle is a permutation
that depends on the seed and the sizes only; it reads every sample at a random offset. All data sets must be local.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import DataConfigError, DataPipelineError, FaultKind, SampleError
from data_pipeline.io.untrusted import open_regular
from data_pipeline.order.fault_lists import Exclusions, read_lists
from data_pipeline.order.randomness import Permutation
from data_pipeline.prepare.choices import SampleKeys
from data_pipeline.prepare.lists import KEY_DIGITS
from data_pipeline.prepare.rows import Members, SourceRow, chunks_of, read_rows
from data_pipeline.shards.index import ShardIndex, extent
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import cut_members

_OPEN_SHARDS = 128
_INDICES_AT_ONCE = 4096


@dataclass(frozen=True)
class NamedManifest:
    """A manifest, and the name of its data set in exclude and keep lists."""

    name: str
    path: Path


@dataclass(frozen=True)
class Selection:
    """The samples to store, their order and their keys.

    Attributes:
        exclude: Lists of samples to leave out, as ``mmscale data dedup`` and a run's quarantine write them.
        keep: Lists of samples to store; all others are left out. Empty means all samples.
        shuffle: Seed of a permutation of all samples; None keeps the order of data sets and samples.
        keys: Keys of the samples in the new shards.
    """

    exclude: tuple[Path, ...] = ()
    keep: tuple[Path, ...] = ()
    shuffle: int | None = None
    keys: SampleKeys = SampleKeys.KEEP


class ReshardSource:
    """Samples of data sets as rows of an ingest.

    ``image_tokenizer`` is the SHA-256 of the image tokenizer of their token grids, None without grids.

    Args:
        sets: The data sets, in the order in which they are joined.
        selection: The samples to store, their order and their keys.

    Raises:
        DataConfigError: no sample is selected, two data sets have one name or different image tokenizers, a list names
            none of them or was made for other data, or a manifest is remote.
        ManifestError: a manifest cannot be opened.
    """

    def __init__(self, sets: Sequence[NamedManifest], selection: Selection) -> None:
        self._sets, self._selection = tuple(sets), selection
        names = [each.name for each in sets]
        if len(set(names)) < len(names):
            raise DataConfigError(
                f"two data sets have the same name ({', '.join(names)}): give them names, NAME=MANIFEST"
            )
        self._manifests = [Manifest.open(each.path) for each in sets]
        tokenizers = dict.fromkeys(m.image_tokenizer for m in self._manifests if m.image_tokenizer is not None)
        if len(tokenizers) > 1:
            raise DataConfigError(
                f"{', '.join(names)}: their token grids are of different image tokenizers "
                f"({', '.join(each[:12] for each in tokenizers)}), so one run cannot read them together; encode them "
                "with one tokenizer: mmscale data encode"
            )
        self.image_tokenizer = next(iter(tokenizers), None)
        self._folders = [manifest.file.parent for manifest in self._manifests]  # Raises for a remote manifest.
        sizes = [manifest.num_samples for manifest in self._manifests]
        self._starts = np.cumsum([0, *sizes])
        self._excluded = self._read_lists(selection.exclude, "--exclude")
        self._kept = self._read_lists(selection.keep, "--keep") if selection.keep else None
        self._count = sum(self._count_of(number, size) for number, size in enumerate(sizes))
        if not self._count:
            raise DataConfigError(f"{', '.join(names)}: no sample is left to store")
        self.reader = StoredSampleReader(self._sets)
        order = "in order" if selection.shuffle is None else f"shuffled with seed {selection.shuffle}"
        total = int(self._starts[-1])
        self.description = f"{self._count:,} of {total:,} samples of {', '.join(names)}, {order}"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        return chunks_of(self._rows())

    def count(self) -> int:
        return self._count

    def digest(self) -> str:
        selection = self._selection
        digest = hashlib.sha256(f"{selection.shuffle} {selection.keys.value}".encode())
        for each, manifest in zip(self._sets, self._manifests, strict=True):
            digest.update(f"{each.name!a} {manifest.fingerprint}\n".encode())
        for lists in (self._excluded, self._kept or [None] * len(self._sets)):
            for found in lists:
                digest.update(b"-" if found is None else found.indices.tobytes() + b"\n")
        return digest.hexdigest()

    def _read_lists(self, paths: Sequence[Path], option: str) -> list[Exclusions | None]:
        found = read_lists(paths, option)
        if found and not set(found) & {each.name for each in self._sets}:
            raise DataConfigError(
                f"{option}: the lists name the data sets {', '.join(found)}, but the given ones are called "
                f"{', '.join(each.name for each in self._sets)}: give them names, NAME=MANIFEST"
            )
        for number, each in enumerate(self._sets):
            last = int(found[each.name].indices[-1]) if each.name in found else 0
            if last >= self._manifests[number].num_samples:
                raise DataConfigError(
                    f"{option}: the lists name sample {last} of {each.name}, which has "
                    f"{self._manifests[number].num_samples}: they were made for other data"
                )
        return [found.get(each.name) for each in self._sets]

    def _count_of(self, number: int, size: int) -> int:
        excluded, kept = self._excluded[number], None if self._kept is None else self._kept[number]
        if self._kept is None:
            return size - (0 if excluded is None else len(excluded.indices))
        if kept is None:
            return 0
        return len(kept.indices if excluded is None else np.setdiff1d(kept.indices, excluded.indices))

    def _rows(self) -> Iterator[SourceRow]:
        indexes, number = _OpenIndexes(self._manifests), 0
        for set_number, sample in self._order():
            excluded = _listed_key(self._excluded[set_number], sample)
            kept = None if self._kept is None else _listed_key(self._kept[set_number], sample)
            if excluded is None and kept is None and self._kept is not None:
                continue
            shard, row = self._manifests[set_number].locate(sample)
            key = indexes.get(set_number, shard).row(row).key
            if {excluded, kept} - {None, crc32(key.encode())}:
                raise DataConfigError(
                    f"sample {sample} of {self._sets[set_number].name} has the key {key!r}, but a list has another: "
                    "the list was made for other data"
                )
            if excluded is None:
                number += 1
                yield SourceRow(number, self._key(number, set_number, shard, key), (set_number, sample))

    def _order(self) -> Iterator[tuple[int, int]]:
        """Yield (number of the data set, index in it) of every sample, in the order of the new shards."""
        total = int(self._starts[-1])
        shuffled = None if self._selection.shuffle is None else Permutation(total, self._selection.shuffle)
        for first in range(0, total, _INDICES_AT_ONCE):
            indices = np.arange(first, min(total, first + _INDICES_AT_ONCE))
            indices = indices if shuffled is None else shuffled.values_at(indices)
            sets = np.searchsorted(self._starts, indices, side="right") - 1
            yield from zip(sets.tolist(), (indices - self._starts[sets]).tolist(), strict=True)

    def _key(self, number: int, set_number: int, shard: int, key: str) -> str:
        if self._selection.keys is SampleKeys.KEEP:
            return key
        if self._selection.keys is SampleKeys.NUMBER:
            return f"{number:0{KEY_DIGITS}d}"
        manifest = self._manifests[set_number]
        stem = str(manifest.shard_path(shard).relative_to(self._folders[set_number]).with_suffix("").as_posix())
        return f"{stem}/{key}" if len(self._sets) == 1 else f"{self._sets[set_number].name}/{stem}/{key}"


def _listed_key(found: Exclusions | None, sample: int) -> int | None:
    """Return the crc32 of the key that a list stores for a sample; None if the list does not name the sample."""
    position = None if found is None else found.position(sample)
    return None if found is None or position is None else int(found.key_crc32[position])


class _OpenIndexes:
    """Keeps the most recently used indexes open. Their number is limited, because each holds a file descriptor."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifests = manifests
        self._open: OrderedDict[tuple[int, int], ShardIndex] = OrderedDict()

    def get(self, set_number: int, shard: int) -> ShardIndex:
        number = (set_number, shard)
        if number not in self._open:
            self._open[number] = self._manifests[set_number].open_index(shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


@dataclass
class StoredSampleReader:
    """Reads members of samples as stored and checks their crc32. Every process has its own copy."""

    sets: tuple[NamedManifest, ...]
    _indexes: _OpenIndexes | None = field(default=None, repr=False)
    _manifests: list[Manifest] = field(default_factory=list, repr=False)
    _files: OrderedDict[Path, IO[bytes]] = field(default_factory=OrderedDict, repr=False)

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        return read_rows(rows, self._read)

    def _read(self, reference: tuple[int, int]) -> Members:
        set_number, sample = reference
        if self._indexes is None:
            self._manifests = [Manifest.open(each.path) for each in self.sets]
            self._indexes = _OpenIndexes(self._manifests)
        shard, row = self._manifests[set_number].locate(sample)
        try:
            index = self._indexes.get(set_number, shard)
            listed = index.row(row).members
            data = self._pread(self._manifests[set_number].shard_path(shard), *extent(listed))
        except (DataPipelineError, OSError) as error:
            raise SampleError(str(error), kind=FaultKind.SHARD) from error
        members = cut_members(listed, data)
        for member in listed:
            if crc32(members[member.ext]) != member.crc32:
                raise SampleError(
                    f"{index.tar_path}: the bytes of .{member.ext} changed since they were indexed (crc32)",
                    kind=FaultKind.CHECKSUM,
                )
        return members

    def _pread(self, path: Path, first: int, end: int) -> bytes:
        if path not in self._files:
            self._files[path] = open_regular(path)
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        descriptor = self._files[path].fileno()
        data = b""
        while len(data) < end - first:  # One pread returns at most 2 GiB.
            more = os.pread(descriptor, end - first - len(data), first + len(data))
            if not more:
                raise SampleError(f"{path}: ends at byte {first + len(data)}, but a sample ends at byte {end}")
            data += more
        return data
