"""One sample by number: index lookup, positional reads, checksums, parts in reading order.

    SampleReader --LocalShard or RemoteShard--> bytes of each member --assemble--> Sample

A shard is a tar that is open for reading. Of a remote data set a lane names the blocks that it needs soon (``expect``);
each is fetched in the background by a request or two, and its samples are taken from memory.

Not for: order (``lanes``), pages (``pages``), pixels (``decode``), remote access itself (``storage``).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import AbsentError, FaultKind, ReplacedError, SampleError, ShardError, StaleError
from data_pipeline.io.json_member import parse_member
from data_pipeline.io.untrusted import regular_descriptor
from data_pipeline.sample import ImagePart, Provenance, Sample, TextPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.index import Member, ShardIndex, extent, is_packed
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pages import PAGE_FIELDS, images_among, take_parts
from data_pipeline.storage.background import Background
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import RemoteObject
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.read_ahead import Stretch

_TEXT_EXTENSIONS = ("txt", "json")

MAX_TEXT_BYTES = 1 << 26
"""Default bound of a ``txt`` or ``json`` member: parsed, JSON takes up to thirty times its length."""


class SampleReader:
    """Reads samples of one manifest in any order.

    Keeps the last ``max_open`` shards open. One per process: descriptors are not shared between workers.

    Args:
        manifest: The data set.
        dataset: Its name, for provenance.
        max_open: Shards kept open, at least 1.
        max_text_bytes: A larger ``txt`` or ``json`` member is a bad sample, and is not read.
    """

    def __init__(
        self, manifest: Manifest, dataset: str, *, max_open: int = 64, max_text_bytes: int = MAX_TEXT_BYTES
    ) -> None:
        self.manifest = manifest
        self.dataset = dataset
        self._max_open = max_open
        self._max_text_bytes = max_text_bytes
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._ahead: dict[int, list[tuple[range, Stretch]]] = {}
        self._genuine: set[int] = set()

    def _shard(self, number: int) -> OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = open_shard(self.manifest, number)
        self._open[number] = shard
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        return shard

    def where(self, sample_index: int) -> tuple[str, str]:
        """Shard and key of a sample, without reading it."""
        number, row = self.manifest.locate(sample_index)
        index = self._shard(number).index
        return str(index.tar_path), index.row(row).key

    def offset(self, sample_index: int) -> int:
        """First byte of a sample in its shard, without reading it."""
        number, row = self.manifest.locate(sample_index)
        return self._shard(number).index.row(row).members[0].offset

    def extensions(self, sample_index: int) -> tuple[str, ...]:
        """Extensions of all files in a sample's shard, without reading it."""
        return self._shard(self.manifest.locate(sample_index)[0]).index.extensions

    def expect(self, lane: int, blocks: Sequence[range]) -> None:
        """Names all samples that a lane needs now and next, in order: remote ones are fetched in the background.

        What an earlier call named and this one does not is let go. Local samples need no such care.
        """
        if self.manifest.is_remote:
            wanted = [(rows, self._stretch(number, rows)) for block in blocks for number, rows in self._by_shard(block)]
            owner = (self.dataset, lane)
            ready = self.manifest.storage.read_ahead.expect(owner, [stretch for _, stretch in wanted])
            self._ahead[lane] = [(rows, stretch) for (rows, _), stretch in zip(wanted, ready, strict=True)]

    def _by_shard(self, samples: range) -> Iterator[tuple[int, range]]:
        """Consecutive samples, cut where a shard ends."""
        while samples:
            number = self.manifest.locate(samples.start)[0]
            end = min(samples.stop, int(self.manifest.cu_samples[number + 1]))
            yield number, range(samples.start, end)
            samples = range(end, samples.stop)

    def _stretch(self, number: int, samples: range) -> Stretch:
        return Stretch((number, samples.start, samples.stop), functools.partial(self._find, number, samples))

    async def _find(self, number: int, samples: range) -> tuple[RemoteObject, Range]:
        """The bytes of neighbours in one shard; runs beside ``read``, so it shares nothing with it."""
        shard, start = await open_remote(self.manifest, number), int(self.manifest.cu_samples[number])
        first, last = (shard.index.row(sample - start).members for sample in (samples.start, samples.stop - 1))
        return shard.remote, Range(extent(first)[0], extent(last)[1])

    def read(self, sample_index: int, epoch: int = 0, lane: int = -1) -> Sample:
        """The sample with its members in reading order.

        Args:
            sample_index: Number of the sample.
            epoch: Epoch, for provenance.
            lane: Whose expectations may hold it.

        Raises:
            ManifestError: the shard's index is missing or stale.
            ShardError: the shard is missing, unreadable or shorter than its index says.
            StorageError: a server refused, or failed for too long.
            SampleError: a member does not match its checksum, or its JSON or text is malformed.
            ReplacedError: no member of a remote shard does.
        """
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        key, listed, _ = shard.index.row(row)
        origin = Provenance(self.dataset, str(shard.index.tar_path), key, sample_index, epoch)
        check_text_sizes({member.ext: member.size for member in listed}, origin, self._max_text_bytes)
        members = self._fetched(sample_index, lane, listed) if self._ahead else None
        if members is None:
            members = shard.read(listed)
        for member in listed:
            if crc32(members[member.ext]) != member.crc32:
                members = shard.read(listed, fresh=True)  # It may have happened on the way.
                for again in listed:
                    try:
                        _check(again, members[again.ext], origin)
                    except SampleError:
                        self._check_genuine(number, row)
                        raise
                break
        sizes = {member.ext: (member.height, member.width) for member in listed if member.width}
        return assemble(members, origin, sizes, self._max_text_bytes)

    def _check_genuine(self, number: int, row: int) -> None:
        """Tells a damaged sample of a remote shard from a shard that was replaced, once while the shard is open.

        Looks at up to three other samples. A version that the server names would not do: data sets are often indexed on
        a disk, before there is a version.

        Raises:
            ReplacedError: not one of them has its checksums.
        """
        if not self.manifest.is_remote or number in self._genuine:
            return
        shard = self._shard(number)
        rows = {0, len(shard.index) // 2, len(shard.index) - 1} - {row}
        for other in sorted(rows):
            listed = shard.index.row(other).members
            members = shard.read(listed, fresh=True)
            if all(crc32(members[member.ext]) == member.crc32 for member in listed):
                self._genuine.add(number)
                return
        if rows:
            raise ReplacedError(
                f"shard {shard.index.tar_path}: its index is stale: the tar was replaced by another of equal size (not "
                f"one of {len(rows) + 1} samples has its checksums); put the old tar back, or renew index and manifest "
                "with: mmscale data index"
            )

    def _fetched(self, sample_index: int, lane: int, members: Sequence[Member]) -> dict[str, bytes] | None:
        """Bytes of a sample, by extension, that were fetched ahead; None if they were not."""
        for samples, stretch in self._ahead.get(lane, ()):
            if sample_index in samples:
                with shard_errors():
                    data = stretch.get(*extent(members))
                return None if data is None else cut_members(members, data)
        return None

    def read_outline(self, sample_index: int, epoch: int = 0) -> Sample:
        """The sample without the bytes of its images, for ``DocumentBuilder.measure``; only text is read.

        Raises:
            As ``read``; the bytes of the images are not checked.
        """
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        key, listed, _ = shard.index.row(row)
        origin = Provenance(self.dataset, str(shard.index.tar_path), key, sample_index, epoch)
        members: dict[str, bytes] = {}
        sizes: dict[str, tuple[int, int]] = {}
        check_text_sizes({member.ext: member.size for member in listed}, origin, self._max_text_bytes)
        for member in listed:
            payload = b""
            if is_image(member.ext):
                sizes[member.ext] = (member.height, member.width)
            elif member.ext in _TEXT_EXTENSIONS:
                payload = shard.read([member])[member.ext]
                _check(member, payload, origin)
            members[member.ext] = payload
        return assemble(members, origin, sizes, self._max_text_bytes)

    def forget(self, shard_number: int) -> None:
        """Closes a shard, so that the next read opens it anew; nothing if it is not open."""
        self._genuine.discard(shard_number)
        shard = self._open.pop(shard_number, None)
        if shard is not None:
            shard.close()

    def close(self) -> None:
        """Closes every descriptor; the reader opens them again when needed."""
        while self._open:
            self._open.popitem()[1].close()


def _check(member: Member, payload: bytes, origin: Provenance) -> None:
    found = crc32(payload)
    if found != member.crc32:
        raise SampleError(
            f"member {member.ext} has crc32 {found:08x}, its index says {member.crc32:08x}: the bytes changed since",
            kind=FaultKind.CHECKSUM,
            shard=origin.shard,
            key=origin.key,
        )


def check_text_sizes(sizes: Mapping[str, int], origin: Provenance, max_bytes: int) -> None:
    """Refuses a sample whose text would take too much memory.

    Args:
        sizes: Bytes of its members by extension.
        origin: For the message.
        max_bytes: Of a ``txt`` or ``json`` member.

    Raises:
        SampleError: a text member is larger.
    """
    for ext in _TEXT_EXTENSIONS:
        if sizes.get(ext, 0) > max_bytes:
            reason = f".{ext} has {sizes[ext]} bytes, the limit is {max_bytes} (max_text_bytes of the data set)"
            raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)


def assemble(
    members: Mapping[str, bytes],
    origin: Provenance,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Sample:
    """Parts and fields of one sample from its members by extension.

    The JSON member of a page gives the order (``pages``); without, the images come in order of extension, then the
    caption (``txt``, or ``caption``, or the first of ``captions``). A ``txt`` member is the field ``caption`` too.

    Args:
        members: Bytes by extension.
        origin: Where they come from.
        sizes: Height and width of images by extension, as far as the index knows them.
        max_text_bytes: A larger ``txt`` or ``json`` member is refused.

    Raises:
        SampleError: malformed JSON or text, a text that is too long, an image of a page that is no member, or nothing
            at all.
    """
    check_text_sizes({ext: len(content) for ext, content in members.items()}, origin, max_text_bytes)
    packed = next(filter(is_packed, members), None)
    if packed is not None:
        reason = f".{packed} is compressed, and training unpacks nothing; mmscale data ingest stores it unpacked"
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)
    sizes = sizes or {}
    try:
        fields: Any = parse_member(members["json"]) if "json" in members else {}
        if not isinstance(fields, dict):
            held = type(fields).__name__
            raise SampleError(f"the JSON member holds a {held}, expected an object", kind=FaultKind.TEXT)
        if "txt" in members:
            text = members["txt"].decode("utf-8")
            if fields.get("caption") is None:
                fields["caption"] = text
        parts = None if PAGE_FIELDS.isdisjoint(fields) else take_parts(fields, members, sizes, origin.key)
    except UnicodeDecodeError as error:
        reason = f"malformed text: {error}"
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key) from error
    except SampleError as error:
        raise error.located(origin.shard, origin.key) from error
    if parts is None:
        parts = [ImagePart(members[ext], ext, sizes.get(ext)) for ext in images_among(tuple(members))]
        caption = fields.get("caption")
        if caption is None:
            captions = fields.get("captions")
            caption = captions[0] if isinstance(captions, list) and captions else None
        if isinstance(caption, str) and caption:
            parts.append(TextPart(caption))
    if not parts and not fields:
        reason = f"neither image nor text among its members: {', '.join(members) or 'none'}"
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)
    return Sample(tuple(parts), fields, origin)


def read_samples(manifest_path: Path | str, dataset: str = "evaluation", *, outlines: bool = False) -> Iterator[Sample]:
    """Every sample of a manifest, in stored order, once; with ``outlines`` without the bytes of images.

    Raises:
        As ``SampleReader.read``; a bad sample ends the iteration, since an evaluation must not skip silently.
    """
    reader = SampleReader(Manifest.open(manifest_path), dataset)
    try:
        for index in range(reader.manifest.num_samples):
            yield reader.read_outline(index) if outlines else reader.read(index)
    finally:
        reader.close()


class OpenShard(Protocol):
    """Bytes and index of one shard."""

    index: ShardIndex

    def read(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """Bytes of neighbouring members, by extension.

        Args:
            members: Members of one sample, in the order of the tar.
            fresh: Passes by copies of them, for a caller who found them wrong.

        Raises:
            ShardError: the tar is missing, unreadable, replaced or too short.
            StorageError: the server refused, or failed for too long: no fault of this shard.
        """
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

    def read(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """As ``OpenShard.read``. A call for each member costs less than to copy an image out of the whole."""
        found = {}
        for member in members:
            first, end = member.offset, member.offset + member.size
            try:
                data = os.pread(self._descriptor, end - first, first)
                while len(data) < end - first:  # One pread returns at most 2 GiB.
                    more = os.pread(self._descriptor, end - first - len(data), first + len(data))
                    if not more:
                        raise ShardError(
                            f"{self.path}: ends at byte {first + len(data)}, a sample reaches to {end}: the shard was "
                            "truncated; restore it, or index it again"
                        )
                    data += more
            except OSError as error:
                raise ShardError(f"{self.path}: reading bytes {first}-{end} failed: {error.strerror}") from error
            found[member.ext] = data
        return found

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class RemoteShard:
    """A remote tar and its index."""

    def __init__(self, remote: RemoteObject, index: ShardIndex, background: Background) -> None:
        self.remote = remote
        self.index = index
        self._background = background

    def read(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """As ``OpenShard.read``, in one request."""
        with shard_errors():
            data = self._background.run(self.remote.read([Range(*extent(members))], fresh=fresh))[0]
        return cut_members(members, data)

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
