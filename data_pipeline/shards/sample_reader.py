"""Read one sample by number: look up its index entry, read its members, verify checksums, order its parts.

    SampleReader --LocalShard or RemoteShard--> bytes of each member --assemble--> Sample

For a remote data set, a lane announces the blocks that it needs soon (``prefetch``). The storage fetches each block in
the background with a few requests, and ``read`` returns its samples from memory.

``lanes`` decides the order, ``pages`` parses pages, ``decode`` decodes images, and ``storage`` reads remote objects.
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
from data_pipeline.io.retry import retry_io
from data_pipeline.io.untrusted import regular_descriptor
from data_pipeline.sample import AudioSize, Part, Provenance, Sample, TextPart, VideoSize
from data_pipeline.shards.index import Member, ShardIndex, extent, is_compressed
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.pages import PAGE_FIELDS, MediaSize, Sizes, media_parts, pop_page_parts
from data_pipeline.shards.token_grid import is_grid, with_encoded_media
from data_pipeline.storage.background import Background
from data_pipeline.storage.location import Url
from data_pipeline.storage.objects import RemoteObject
from data_pipeline.storage.ranges import Range
from data_pipeline.storage.read_ahead import PrefetchedRange

_TEXT_EXTENSIONS = ("txt", "json")

MAX_TEXT_BYTES = 1 << 26
"""Default largest ``txt`` or ``json`` member in bytes. Parsed JSON can take thirty times its length in memory."""


class SampleReader:
    """Reads samples of one manifest in any order.

    Keeps the ``max_open`` most recently used shards open. Create one reader in each process: descriptors must not be
    shared between workers.

    Args:
        manifest: The data set.
        dataset: Its name, stored in each sample's provenance.
        max_open: Largest number of open shards, at least 1. Not checked.
        max_text_bytes: Size limit of a ``txt`` or ``json`` member. A larger one is not read; ``read`` raises.
    """

    def __init__(
        self, manifest: Manifest, dataset: str, *, max_open: int = 64, max_text_bytes: int = MAX_TEXT_BYTES
    ) -> None:
        self.manifest = manifest
        self.dataset = dataset
        self._max_open = max_open
        self._max_text_bytes = max_text_bytes
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._prefetched: dict[int, list[tuple[range, PrefetchedRange]]] = {}
        self._confirmed: set[int] = set()
        """Remote shards of which one sample was found to match its checksums."""

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
        """Return shard and key of a sample, without reading it."""
        number, row = self.manifest.locate(sample_index)
        index = self._shard(number).index
        return str(index.tar_path), index.row(row).key

    def offset(self, sample_index: int) -> int:
        """Return the offset in its shard of a sample's first content byte, without reading the sample."""
        number, row = self.manifest.locate(sample_index)
        return self._shard(number).index.row(row).members[0].offset

    def extensions(self, sample_index: int) -> tuple[str, ...]:
        """Return all member extensions of the shard that contains a sample, without reading the shard."""
        return self._shard(self.manifest.locate(sample_index)[0]).index.extensions

    def prefetch(self, lane: int, blocks: Sequence[range]) -> None:
        """Fetch in the background all samples that a lane needs now and next; does nothing for a local data set.

        Each call replaces the lane's earlier list: blocks that are missing from ``blocks`` are dropped from memory.

        Args:
            lane: The lane; ``read`` must be called with the same number.
            blocks: Ranges of sample numbers, in the order of use.
        """
        if self.manifest.is_remote:
            ranges = [part for block in blocks for part in self._by_shard(block)]
            wanted = [(samples, self._to_fetch(number, samples)) for number, samples in ranges]
            owner = (self.dataset, lane)
            active = self.manifest.storage.read_ahead.prefetch(owner, [fetch for _, fetch in wanted])
            self._prefetched[lane] = [(samples, fetch) for (samples, _), fetch in zip(wanted, active, strict=True)]

    def _by_shard(self, samples: range) -> Iterator[tuple[int, range]]:
        """Split a range of sample numbers at shard boundaries; yield (shard number, samples)."""
        while samples:
            number = self.manifest.locate(samples.start)[0]
            end = min(samples.stop, int(self.manifest.cu_samples[number + 1]))
            yield number, range(samples.start, end)
            samples = range(end, samples.stop)

    def _to_fetch(self, number: int, samples: range) -> PrefetchedRange:
        key = (number, samples.start, samples.stop)
        return PrefetchedRange(key, functools.partial(self._locate, number, samples))

    async def _locate(self, number: int, samples: range) -> tuple[RemoteObject, Range]:
        """Return the byte range of consecutive samples of one shard.

        Runs in the storage's thread, concurrently with ``read``, so it must not use the reader's open shards.
        """
        shard, start = await open_remote(self.manifest, number), int(self.manifest.cu_samples[number])
        first, last = (shard.index.row(sample - start).members for sample in (samples.start, samples.stop - 1))
        return shard.remote, Range(extent(first)[0], extent(last)[1])

    def read(self, sample_index: int, epoch: int = 0, lane: int = -1) -> Sample:
        """Return the sample with its parts in reading order.

        If a member does not match its checksum, all members are read once more, without the cache, before this raises.

        Args:
            sample_index: Number of the sample in the manifest.
            epoch: Stored in the sample's provenance.
            lane: The lane whose prefetched blocks may contain the sample.

        Raises:
            IndexError: the manifest has no such sample.
            ManifestError: the shard's index is missing, damaged or stale.
            ShardError: the shard is missing, unreadable or shorter than its index says.
            StorageError: a server rejected the request, or failed for too long.
            SampleError: a member does not match its checksum, its JSON or text is malformed, or it is too large.
            ReplacedError: none of several samples of a remote shard matches its checksums.
        """
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        key, listed, _ = shard.index.row(row)
        origin = Provenance(self.dataset, str(shard.index.tar_path), key, sample_index, epoch)
        check_text_sizes({member.ext: member.size for member in listed}, origin, self._max_text_bytes)
        members = self._prefetched_members(sample_index, lane, listed) if self._prefetched else None
        if members is None:
            members = shard.read(listed)
        for member in listed:
            if crc32(members[member.ext]) != member.crc32:
                members = shard.read(listed, fresh=True)  # The bytes may have been damaged in transfer or in the cache.
                for reread in listed:
                    try:
                        _check(reread, members[reread.ext], origin)
                    except SampleError:
                        self._raise_if_replaced(number, row)
                        raise
                break
        has_sounds = shard.index.has_sounds
        sizes = {m.ext: _size(m, has_sounds) for m in listed if m.width or m.samples}
        return assemble(members, origin, sizes, self._max_text_bytes)

    def _raise_if_replaced(self, number: int, row: int) -> None:
        """Raise if a remote shard was replaced, rather than one of its samples damaged.

        Compares up to three other samples with their checksums, until one matches. A shard of one sample never raises.
        The server's version of the object (etag) cannot decide it: data sets are often indexed on a disk, before the
        upload.

        Raises:
            ReplacedError: none of the other samples matches its checksums.
        """
        if not self.manifest.is_remote or number in self._confirmed:
            return
        shard = self._shard(number)
        rows = {0, len(shard.index) // 2, len(shard.index) - 1} - {row}
        for other in sorted(rows):
            listed = shard.index.row(other).members
            members = shard.read(listed, fresh=True)
            if all(crc32(members[member.ext]) == member.crc32 for member in listed):
                self._confirmed.add(number)
                return
        if rows:
            raise ReplacedError(
                f"shard {shard.index.tar_path}: its index is stale: the tar was replaced by another of equal size "
                f"(none of {len(rows) + 1} samples matches its checksums); put the old tar back, or update index and "
                "manifest with: mmscale data index"
            )

    def _prefetched_members(self, sample_index: int, lane: int, members: Sequence[Member]) -> dict[str, bytes] | None:
        """Return a sample's prefetched bytes by extension; None if the caller must read them. May block on a fetch."""
        for samples, fetch in self._prefetched.get(lane, ()):
            if sample_index in samples:
                with shard_errors():
                    data = fetch.get(*extent(members))
                return None if data is None else cut_members(members, data)
        return None

    def read_without_images(self, sample_index: int, epoch: int = 0) -> Sample:
        """Return the sample with empty media, for ``DocumentBuilder.dry_run``; reads only text members.

        Raises:
            As ``read``, except that media are not verified, a damaged text member is not read a second
            time, and ``ReplacedError`` is not raised.
        """
        number, row = self.manifest.locate(sample_index)
        shard = self._shard(number)
        key, listed, _ = shard.index.row(row)
        origin = Provenance(self.dataset, str(shard.index.tar_path), key, sample_index, epoch)
        members: dict[str, bytes] = {}
        sizes: dict[str, MediaSize] = {}
        check_text_sizes({member.ext: member.size for member in listed}, origin, self._max_text_bytes)
        for member in listed:
            payload = b""
            if media_kind(member.ext) is not None:
                sizes[member.ext] = _size(member, shard.index.has_sounds)
            elif member.ext in _TEXT_EXTENSIONS or is_grid(member.ext):
                payload = shard.read([member])[member.ext]
                _check(member, payload, origin)
            members[member.ext] = payload
        return assemble(members, origin, sizes, self._max_text_bytes)

    def forget(self, shard_number: int) -> None:
        """Close a shard so that the next read reopens it. Does nothing if it is not open."""
        self._confirmed.discard(shard_number)
        shard = self._open.pop(shard_number, None)
        if shard is not None:
            shard.close()

    def close(self) -> None:
        """Close all shards. The reader can still be used: it reopens shards on demand."""
        while self._open:
            self._open.popitem()[1].close()


def _size(member: Member, has_sounds: bool) -> MediaSize:
    """Return the size of an image, video or sound, from its index entry; see ``ShardIndex.has_sounds``."""
    kind, sound = media_kind(member.ext), AudioSize(member.samples, member.rate, member.channels)
    if kind == "audio":
        return sound
    if kind == "video":
        video = VideoSize(member.num_frames, member.microseconds, member.height, member.width)
        return video, sound if has_sounds else None
    return member.height, member.width


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
    """Raise if a text member would take too much memory.

    Args:
        sizes: Member sizes in bytes, by extension.
        origin: The sample, for the message.
        max_bytes: Largest accepted ``txt`` or ``json`` member.

    Raises:
        SampleError: a ``txt`` or ``json`` member is larger than ``max_bytes``.
    """
    for ext in _TEXT_EXTENSIONS:
        if sizes.get(ext, 0) > max_bytes:
            reason = f".{ext} has {sizes[ext]} bytes, the limit is {max_bytes} (max_text_bytes of the data set)"
            raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)


def assemble(
    members: Mapping[str, bytes],
    origin: Provenance,
    sizes: Sizes | None = None,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Sample:
    """Build one sample from its members.

    The JSON member of a page determines the parts (``pages``). Without a page, the parts are its media in the
    order of ``image_order``, then the caption. The caption is the JSON field ``caption``, else the ``txt`` member,
    else the first of ``captions``. A caption that is empty or not a string gives no part. A ``txt`` member also sets
    the field ``caption`` if the JSON has none. A member ``jpg.tokens`` holds the token ids of the image or video
    ``jpg``, which may be missing.

    Args:
        members: Content of each member, by extension.
        origin: Provenance of the sample.
        sizes: Sizes of images, videos and sounds by extension. A member of unknown size is absent or 0.
        max_text_bytes: Size limit of a ``txt`` or ``json`` member.

    Raises:
        SampleError: the JSON or text is malformed or too large, a member is compressed, an image of the page is no
            member, or the sample has neither parts nor fields.
    """
    check_text_sizes({ext: len(content) for ext, content in members.items()}, origin, max_text_bytes)
    compressed = next(filter(is_compressed, members), None)
    if compressed is not None:
        reason = (
            f".{compressed} is compressed, and training reads no compressed members; "
            "mmscale data ingest stores it uncompressed"
        )
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)
    sizes = sizes or {}
    members = with_encoded_media(members)
    try:
        fields: Any = parse_member(members["json"]) if "json" in members else {}
        if not isinstance(fields, dict):
            held = type(fields).__name__
            raise SampleError(f"the JSON member holds a {held}, expected an object", kind=FaultKind.TEXT)
        if "txt" in members:
            text = members["txt"].decode("utf-8")
            if fields.get("caption") is None:
                fields["caption"] = text
        parts = None if PAGE_FIELDS.isdisjoint(fields) else pop_page_parts(fields, members, sizes, origin.key)
        media = media_parts(fields, members, sizes, origin.key) if parts is None else []
    except UnicodeDecodeError as error:
        reason = f"malformed text: {error}"
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key) from error
    except SampleError as error:
        raise error.located(origin.shard, origin.key) from error
    if parts is None:
        parts = list[Part](media)
        caption = fields.get("caption")
        if caption is None:
            captions = fields.get("captions")
            caption = captions[0] if isinstance(captions, list) and captions else None
        if isinstance(caption, str) and caption:
            parts.append(TextPart(caption))
    if not parts and not fields:
        reason = f"neither image nor video nor sound nor text among its members: {', '.join(members) or 'none'}"
        raise SampleError(reason, kind=FaultKind.TEXT, shard=origin.shard, key=origin.key)
    return Sample(tuple(parts), fields, origin)


def read_samples(manifest_path: Path | str, dataset: str = "evaluation", *, images: bool = True) -> Iterator[Sample]:
    """Yield every sample of a manifest in stored order; with ``images=False``, images are empty.

    Raises:
        As ``SampleReader.read``. A bad sample raises instead of being skipped, because an evaluation must not skip
            samples silently.
    """
    reader = SampleReader(Manifest.open(manifest_path), dataset)
    try:
        for index in range(reader.manifest.num_samples):
            yield reader.read(index) if images else reader.read_without_images(index)
    finally:
        reader.close()


class OpenShard(Protocol):
    """An open shard: its index, and access to its bytes."""

    index: ShardIndex

    def read(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """Return the content of members, by extension.

        Args:
            members: Members of one sample, in the order of the tar.
            fresh: Ignore cached bytes, for a caller whose checksum did not match.

        Raises:
            ShardError: the tar is missing, unreadable, replaced or too short.
            StorageError: the server rejected the request, or failed for too long.
        """
        ...

    def close(self) -> None:
        """Release the shard's descriptor, if it has one."""
        ...


class LocalShard:
    """A shard in a local file. Reads wait for a file system that is lost, see ``io.retry``."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.path = path
        self.index = index
        try:
            self._descriptor = retry_io(lambda: regular_descriptor(path, os.O_RDONLY))
        except OSError as error:
            raise ShardError(f"{path}: cannot be opened: {error.strerror}") from error

    def read(self, members: Sequence[Member], *, fresh: bool = False) -> dict[str, bytes]:
        """As ``OpenShard.read``."""
        try:
            return retry_io(functools.partial(self._read, members), self._reopen)
        except OSError as error:
            first, end = extent(members)
            raise ShardError(f"{self.path}: reading bytes {first}-{end} failed: {error.strerror}") from error

    def _read(self, members: Sequence[Member]) -> dict[str, bytes]:
        """Read the members once. One ``pread`` per member is faster than one large read, because slices copy."""
        found = {}
        for member in members:
            first, end = member.offset, member.offset + member.size
            data = os.pread(self._descriptor, end - first, first)
            while len(data) < end - first:  # One pread returns at most 2 GiB.
                more = os.pread(self._descriptor, end - first - len(data), first + len(data))
                if not more:
                    raise ShardError(
                        f"{self.path}: ends at byte {first + len(data)}, a sample extends to byte {end}: the shard "
                        "was truncated; restore it, or index it again"
                    )
                data += more
            found[member.ext] = data
        return found

    def _reopen(self) -> None:
        """Open the file again: a server that restarts invalidates open files. The caller verifies checksums."""
        opened = regular_descriptor(self.path, os.O_RDONLY)
        try:
            os.dup2(opened, self._descriptor, inheritable=False)
        finally:
            os.close(opened)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class RemoteShard:
    """A shard on a server."""

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
        """Do nothing: a remote shard has no descriptor."""


def cut_members(members: Sequence[Member], data: bytes) -> dict[str, bytes]:
    """Return the content of each member, by extension. ``data`` is the byte range ``extent(members)`` of the tar."""
    first = members[0].offset
    return {member.ext: data[member.offset - first : member.offset - first + member.size] for member in members}


@contextlib.contextmanager
def shard_errors() -> Iterator[None]:
    """Convert ``AbsentError`` and ``StaleError`` of a remote object to ``ShardError``, as for a local file.

    Other storage errors pass through. They mean that the server failed, so the run ends and can be resumed.
    """
    try:
        yield
    except (AbsentError, StaleError) as error:
        raise ShardError(str(error)) from error


def open_shard(manifest: Manifest, number: int) -> OpenShard:
    """Open a local or remote shard of a manifest.

    Raises:
        ManifestError: the shard's index is missing, stale or damaged, or a local shard is missing.
        ShardError: a local shard cannot be opened.
        StorageError: the server rejected the request, or failed for too long.
    """
    location = manifest.shard_location(number)
    if isinstance(location, Url):
        with shard_errors():
            return manifest.storage.background.run(open_remote(manifest, number))
    return LocalShard(location, manifest.open_index(number))


async def open_remote(manifest: Manifest, number: int) -> RemoteShard:
    """Coroutine form of ``open_shard`` for a remote manifest. Fetches the index if it is not cached.

    Raises:
        ManifestError, StorageError: as ``Manifest.fetch_index``.
    """
    location, storage = manifest.shard_location(number), manifest.storage
    assert isinstance(location, Url), "the shards of a remote manifest are remote"
    index = await manifest.fetch_index(number)
    remote = storage.remote_object(location, manifest.shard_bytes(number), manifest.shard_sha256(number))
    return RemoteShard(remote, index, storage.background)
