"""One sample by number: index lookup, one positional read, checksum, parts in reading order.

Not for: order (``lanes``), pixels (``decode``).
"""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import FaultKind, SampleError, ShardError
from data_pipeline.pages import default_images, take_parts
from data_pipeline.sample import Part, Provenance, Sample, TextPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.index import Member, ShardIndex
from data_pipeline.shards.manifest import Manifest

_TEXT_EXTENSIONS = ("txt", "json")


class _OpenShard:
    """A file descriptor and the index of one shard."""

    def __init__(self, index: ShardIndex) -> None:
        self.path = index.tar_path
        self.index = index
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        os.close(self.descriptor)


class SampleReader:
    """Reads samples of one manifest in any order.

    Keeps the last ``max_open`` shards open. One per process: descriptors are not shared between workers.

    Args:
        manifest: The data set.
        dataset: Its name, for provenance.
        max_open: Shards kept open, at least 1.
    """

    def __init__(self, manifest: Manifest, dataset: str, *, max_open: int = 64) -> None:
        self.manifest = manifest
        self.dataset = dataset
        self._max_open = max_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = _OpenShard(self.manifest.open_index(number))
        self._open[number] = shard
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        return shard

    def where(self, sample_index: int) -> tuple[str, str]:
        """Shard and key of a sample, without reading it."""
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        return str(shard.path), shard.index.key(row)

    def read(self, sample_index: int, epoch: int = 0) -> Sample:
        """The sample with its members in reading order.

        Raises:
            ManifestError: the shard's index is missing or stale.
            ShardError: the shard is missing, unreadable or shorter than its index says.
            SampleError: a member does not match its checksum, or its JSON or text is malformed.
        """
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        origin = Provenance(self.dataset, str(shard.path), shard.index.key(row), sample_index, epoch)
        listed = shard.index.members(row)
        first, end = listed[0].offset, listed[-1].offset + listed[-1].size
        data = _read_range(shard, first, end)
        members: dict[str, bytes] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for member in listed:
            payload = data[member.offset - first : member.offset - first + member.size]
            _check(member, payload, origin)
            members[member.ext] = payload
            if member.width:
                sizes[member.ext] = (member.height, member.width)
        return assemble(members, origin, sizes)

    def read_outline(self, sample_index: int, epoch: int = 0) -> Sample:
        """The sample without the bytes of its images, for ``DocumentBuilder.measure``; only text is read.

        Raises:
            As ``read``; the bytes of the images are not checked.
        """
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        origin = Provenance(self.dataset, str(shard.path), shard.index.key(row), sample_index, epoch)
        members: dict[str, bytes] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for member in shard.index.members(row):
            payload = b""
            if is_image(member.ext):
                sizes[member.ext] = (member.height, member.width)
            elif member.ext in _TEXT_EXTENSIONS:
                payload = _read_range(shard, member.offset, member.offset + member.size)
                _check(member, payload, origin)
            members[member.ext] = payload
        return assemble(members, origin, sizes)

    def forget(self, shard_number: int) -> None:
        """Closes a shard, so that the next read opens it anew; nothing if it is not open."""
        shard = self._open.pop(shard_number, None)
        if shard is not None:
            shard.close()

    def close(self) -> None:
        """Closes every descriptor; the reader opens them again when needed."""
        while self._open:
            self._open.popitem()[1].close()


def _read_range(shard: _OpenShard, first: int, end: int) -> bytes:
    try:
        data = os.pread(shard.descriptor, end - first, first)
        while len(data) < end - first:  # One pread returns at most 2 GiB.
            more = os.pread(shard.descriptor, end - first - len(data), first + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise ShardError(f"{shard.path}: reading bytes {first}-{end} failed: {error.strerror}") from error
    if len(data) < end - first:
        raise ShardError(
            f"{shard.path}: ends at byte {first + len(data)}, a sample reaches to {end}: the shard was truncated; "
            "restore it, or index it again"
        )
    return data


def _check(member: Member, payload: bytes, origin: Provenance) -> None:
    crc32 = zlib.crc32(payload)
    if crc32 != member.crc32:
        raise SampleError(
            f"member {member.ext} has crc32 {crc32:08x}, its index says {member.crc32:08x}: the bytes changed on disk",
            kind=FaultKind.CHECKSUM,
            shard=origin.shard,
            key=origin.key,
        )


def assemble(
    members: Mapping[str, bytes], origin: Provenance, sizes: Mapping[str, tuple[int, int]] | None = None
) -> Sample:
    """Parts and fields of one sample from its members by extension.

    The JSON member of a page gives the order (``pages``); without, the images come in order of extension, then the
    caption (``txt``, or ``caption``, or the first of ``captions``). A ``txt`` member is the field ``caption`` too.

    Args:
        members: Bytes by extension.
        origin: Where they come from.
        sizes: Height and width of images by extension, as far as the index knows them.

    Raises:
        SampleError: malformed JSON or text, an image of a page that is no member, or nothing at all.
    """
    try:
        fields = _fields(members)
        sizes = sizes or {}
        parts = take_parts(fields, members, sizes, origin.key)
        if parts is None:
            parts = _default_parts(members, fields, sizes)
    except SampleError as error:
        raise error.located(origin.shard, origin.key) from error
    if not parts and not fields:
        reason = f"neither image nor text among its members: {', '.join(members) or 'none'}"
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)
    return Sample(tuple(parts), fields, origin)


def _fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    try:
        if "json" in members:
            fields = json.loads(members["json"])
        if "txt" in members:
            text = members["txt"].decode("utf-8")
            if isinstance(fields, dict):
                fields.setdefault("caption", text)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are both ValueErrors.
        raise SampleError(f"malformed text or JSON: {error}", kind=FaultKind.TEXT) from error
    if not isinstance(fields, dict):
        raise SampleError(f"the JSON member holds a {type(fields).__name__}, expected an object", kind=FaultKind.TEXT)
    return fields


def _default_parts(
    members: Mapping[str, bytes], fields: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]
) -> list[Part]:
    parts: list[Part] = [*default_images(members, sizes)]
    caption = fields.get("caption")
    if caption is None:
        captions = fields.get("captions")
        caption = captions[0] if isinstance(captions, list) and captions else None
    if isinstance(caption, str) and caption:
        parts.append(TextPart(caption))
    return parts


def read_samples(manifest_path: Path | str, dataset: str = "evaluation") -> Iterator[Sample]:
    """Every sample of a manifest, in stored order, once.

    Raises:
        As ``SampleReader.read``; a bad sample ends the iteration, since an evaluation must not skip silently.
    """
    reader = SampleReader(Manifest.open(Path(manifest_path)), dataset)
    try:
        for index in range(reader.manifest.num_samples):
            yield reader.read(index)
    finally:
        reader.close()
