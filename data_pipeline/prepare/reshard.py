"""Data sets as a source for new shards: other sizes, several joined to one, some samples left out, all shuffled.

    manifests --order, keep and exclude lists--> rows (set, sample) --any process--> members as stored --> ``ingest``

Members are copied as they are, whatever they hold, after a look at their crc32. Shuffled, the order is a permutation of
all samples that seed and sizes alone decide; every sample is then a read at another place, which local disks bear.
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
from data_pipeline.prepare.choices import Keys
from data_pipeline.prepare.lists import KEY_DIGITS
from data_pipeline.prepare.rows import Members, Row, read_each, spans_of
from data_pipeline.shards.index import ShardIndex, extent
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sample_reader import cut_members

_OPEN_SHARDS = 128
_DRAWN_AT_ONCE = 4096


@dataclass(frozen=True)
class NamedManifest:
    """A manifest, and the name that lists of samples call it by."""

    name: str
    path: Path


@dataclass(frozen=True)
class Selection:
    """Which samples become rows, in which order, under which names.

    Attributes:
        exclude: Lists of samples to leave out, as ``mmscale data dedup`` and a run's quarantine write them.
        keep: Lists of the only samples to take; none: all.
        shuffle: Seed of a permutation of all samples; None keeps the order of sets and samples.
        keys: What samples are called.
    """

    exclude: tuple[Path, ...] = ()
    keep: tuple[Path, ...] = ()
    shuffle: int | None = None
    keys: Keys = Keys.KEEP


class ManifestSource:
    """Samples of data sets as rows of an ingest.

    Args:
        sets: The data sets, in their order.
        selection: Which samples, in which order.

    Raises:
        DataConfigError: there is nothing to take, two sets have one name, a list speaks of none of them, or a set lies
            on a server.
        ManifestError: a manifest cannot be opened.
    """

    def __init__(self, sets: Sequence[NamedManifest], selection: Selection) -> None:
        self._sets, self._selection = tuple(sets), selection
        names = [each.name for each in sets]
        if len(set(names)) < len(names):
            raise DataConfigError(f"two data sets are called alike ({', '.join(names)}): name them, NAME=MANIFEST")
        self._manifests = [Manifest.open(each.path) for each in sets]
        self._folders = [manifest.file.parent for manifest in self._manifests]  # Refuses those on a server.
        sizes = [manifest.num_samples for manifest in self._manifests]
        self._starts = np.cumsum([0, *sizes])
        self._excluded = self._listed(selection.exclude, "--exclude")
        self._kept = self._listed(selection.keep, "--keep") if selection.keep else None
        self._count = sum(self._count_of(number, size) for number, size in enumerate(sizes))
        if not self._count:
            raise DataConfigError(f"{', '.join(names)}: no sample is left to store")
        self.reader = ManifestReader(self._sets)
        order = "in order" if selection.shuffle is None else f"shuffled with seed {selection.shuffle}"
        total = int(self._starts[-1])
        self.description = f"{self._count:,} of {total:,} samples of {', '.join(names)}, {order}"

    def spans(self) -> Iterator[Sequence[Row]]:
        return spans_of(self._rows())

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

    def _listed(self, paths: Sequence[Path], option: str) -> list[Exclusions | None]:
        found = read_lists(paths, option)
        if found and not set(found) & {each.name for each in self._sets}:
            raise DataConfigError(
                f"{option}: the lists speak of {', '.join(found)}, the data sets are called "
                f"{', '.join(each.name for each in self._sets)}: name them, NAME=MANIFEST"
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
        gone, kept = self._excluded[number], None if self._kept is None else self._kept[number]
        if self._kept is None:
            return size - (0 if gone is None else len(gone.indices))
        if kept is None:
            return 0
        return len(kept.indices if gone is None else np.setdiff1d(kept.indices, gone.indices))

    def _rows(self) -> Iterator[Row]:
        indexes, number = _OpenIndexes(self._manifests), 0
        for which, sample in self._order():
            gone = _listed_key(self._excluded[which], sample)
            kept = None if self._kept is None else _listed_key(self._kept[which], sample)
            if gone is None and kept is None and self._kept is not None:
                continue
            shard, row = self._manifests[which].locate(sample)
            key = indexes.get(which, shard).row(row).key
            if {gone, kept} - {None, crc32(key.encode())}:
                raise DataConfigError(
                    f"sample {sample} of {self._sets[which].name} is called {key!r}, a list says otherwise: "
                    "it was made for other data"
                )
            if gone is None:
                number += 1
                yield Row(number, self._key(number, which, shard, key), (which, sample))

    def _order(self) -> Iterator[tuple[int, int]]:
        """(set, sample) of every sample."""
        total = int(self._starts[-1])
        shuffled = None if self._selection.shuffle is None else Permutation(total, self._selection.shuffle)
        for first in range(0, total, _DRAWN_AT_ONCE):
            drawn = np.arange(first, min(total, first + _DRAWN_AT_ONCE))
            drawn = drawn if shuffled is None else shuffled.take(drawn)
            sets = np.searchsorted(self._starts, drawn, side="right") - 1
            yield from zip(sets.tolist(), (drawn - self._starts[sets]).tolist(), strict=True)

    def _key(self, number: int, which: int, shard: int, key: str) -> str:
        if self._selection.keys is Keys.KEEP:
            return key
        if self._selection.keys is Keys.NUMBER:
            return f"{number:0{KEY_DIGITS}d}"
        manifest = self._manifests[which]
        stem = str(manifest.shard_path(shard).relative_to(self._folders[which]).with_suffix("").as_posix())
        return f"{stem}/{key}" if len(self._sets) == 1 else f"{self._sets[which].name}/{stem}/{key}"


def _listed_key(found: Exclusions | None, sample: int) -> int | None:
    """crc32 of the key that a list gives a sample; None if it does not name it."""
    place = None if found is None else found.position(sample)
    return None if found is None or place is None else int(found.key_crc32[place])


class _OpenIndexes:
    """The indexes that were used last: each holds a descriptor while it is open."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifests = manifests
        self._open: OrderedDict[tuple[int, int], ShardIndex] = OrderedDict()

    def get(self, which: int, shard: int) -> ShardIndex:
        place = (which, shard)
        if place not in self._open:
            self._open[place] = self._manifests[which].open_index(shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(place)
        return self._open[place]


@dataclass
class ManifestReader:
    """Members of samples as they are stored; one per process."""

    sets: tuple[NamedManifest, ...]
    _indexes: _OpenIndexes | None = field(default=None, repr=False)
    _manifests: list[Manifest] = field(default_factory=list, repr=False)
    _files: OrderedDict[Path, IO[bytes]] = field(default_factory=OrderedDict, repr=False)

    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        return read_each(rows, self._read)

    def _read(self, reference: tuple[int, int]) -> Members:
        which, sample = reference
        if self._indexes is None:
            self._manifests = [Manifest.open(each.path) for each in self.sets]
            self._indexes = _OpenIndexes(self._manifests)
        shard, row = self._manifests[which].locate(sample)
        try:
            index = self._indexes.get(which, shard)
            listed = index.row(row).members
            data = self._pread(self._manifests[which].shard_path(shard), *extent(listed))
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
                raise SampleError(f"{path}: ends at byte {first + len(data)}, a sample reaches to {end}")
            data += more
        return data
