"""The sidecar index of a shard: byte offset, size and checksum of each member, known without reading the tar.

    train-00000.tar  --build_index-->  train-00000.tar.index  --ShardIndex.open-->  byte ranges for pread

The tar stays a plain webdataset tar. The index is a memory-mapped column file (``columns``). It contains no timestamp,
so equal tars give byte-identical indexes. It records size and SHA-256 of its tar, so that a stale index is detected.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import ManifestError, SampleError, ShardError
from data_pipeline.io.checksums import sha256_of
from data_pipeline.io.columns import Column, check_offsets, pack_strings, read_columns, write_columns
from data_pipeline.io.json_member import text_bytes_of
from data_pipeline.io.retry import retry_io
from data_pipeline.io.untrusted import open_regular
from data_pipeline.shards.audio_file import audio_size, track_size
from data_pipeline.shards.image_header import Buffer, image_size
from data_pipeline.shards.media_kind import media_kind
from data_pipeline.shards.tar_members import BLOCK_BYTES, open_tar, split_name, walk
from data_pipeline.shards.video_file import video_size
from data_pipeline.storage.location import Url

INDEX_FORMAT = "mmscale-shard-index-1"
_COLUMNS = {
    "cu_members": ("<i8", 1),
    "key_bytes": ("u1", 1),
    "cu_key_bytes": ("<i8", 1),
    "text_bytes": ("<i8", 1),
    "row_crc32": ("<u4", 1),
    "ext": ("<u2", 1),
    "offset": ("<i8", 1),
    "size": ("<i8", 1),
    "crc32": ("<u4", 1),
    "width": ("<u4", 1),
    "height": ("<u4", 1),
    "num_frames": ("<u4", 1),
    "microseconds": ("<i8", 1),
    "samples": ("<i8", 1),
    "rate": ("<u4", 1),
    "channels": ("<u4", 1),
}
_CHECKSUM = "row_crc32"
"""CRC-32 of a sample's entries in the index. Indexes of earlier versions lack this column and are read unchecked."""
_OF_CLIPS = ("num_frames", "microseconds", "samples", "rate", "channels")
"""Columns that only shards with videos or sounds have. Earlier versions wrote the first two only."""
_MEMBER = struct.Struct("<qqIII")
_VIDEO = struct.Struct("<Iq")
_SOUND = struct.Struct("<qII")
_TEXT_BYTES = struct.Struct("<q")
_MAX_EXTENSIONS = 1 << 16
_SUFFIX = ".index"
_CHUNK_BYTES = 1 << 24
_END_MARK_BYTES = 2 * BLOCK_BYTES


class Member(NamedTuple):
    """One file of a sample.

    Attributes:
        ext: Extension in lower case, the part of the name after the key: ``jpg``, ``0.png``, ``json``.
        offset: Offset of its first content byte in the tar.
        size: Content bytes.
        crc32: CRC-32 of the content, as computed by ``zlib``.
        width, height: Size in pixels after the rotation for display, from the header. 0 if the member is no image and
            no video, or its header is damaged.
        num_frames, microseconds: As in ``VideoSize``; 0 for other members and damaged videos.
        samples, rate, channels: As in ``AudioSize`` and ``VideoPart.sound``; 0 for other members and damaged sounds.
    """

    ext: str
    offset: int
    size: int
    crc32: int
    width: int
    height: int
    num_frames: int = 0
    microseconds: int = 0
    samples: int = 0
    rate: int = 0
    channels: int = 0


class IndexedSample(NamedTuple):
    """The index entry of one sample.

    Attributes:
        key: Its name in the tar.
        members: Its files in the order of the tar, at least one.
        text_bytes: UTF-8 bytes of its text, as counted by ``text_bytes_of``.
    """

    key: str
    members: list[Member]
    text_bytes: int


def index_path(tar_path: Path) -> Path:
    """Return the path of a tar's index: ``X.tar.index``."""
    return tar_path.with_name(tar_path.name + _SUFFIX)


def index_url(tar: Url) -> Url:
    """Return the URL of a remote tar's index."""
    return Url(f"{tar}{_SUFFIX}")


def extent(members: Sequence[Member]) -> tuple[int, int]:
    """Return the byte range [first, end) of the tar that contains ``members``, given in the order of the tar."""
    return members[0].offset, members[-1].offset + members[-1].size


@dataclass(frozen=True)
class ShardIndex:
    """The mapped index of one shard, created by ``open``, ``read`` or ``map``. Processes share its memory pages.

    Opening reads only a few memory pages, because a shuffled order may need a few samples from each of a million
    shards. ``row`` compares the requested row with its checksum; ``check`` verifies all rows.

    Attributes:
        tar_path: The shard's path or URL.
        tar_bytes: Size of the tar when the index was built.
        tar_sha256: SHA-256 of the tar when the index was built, hexadecimal.
        extensions: All member extensions in the shard.
    """

    tar_path: Path | Url
    tar_bytes: int
    tar_sha256: str
    extensions: tuple[str, ...]
    _arrays: dict[str, Column] = field(repr=False)

    @classmethod
    def open(cls, tar_path: str | Path) -> ShardIndex:
        """Map the index of ``tar_path`` and check that it still describes the tar.

        A tar of another size raises. If the tar is newer than its index, which a copy or a checkout can cause too, the
        digests are compared. If they are equal, the index's modification time is updated, so the next call is fast.
        Reads wait for a file system that is lost.

        Raises:
            ManifestError: the index or the tar is missing or unreadable, or the index is damaged or stale. The message
                names the shard and the remedy.
        """
        tar_path = Path(tar_path)
        path = index_path(tar_path)
        remedy = f"build it with: mmscale data index {tar_path}"
        try:
            tar_stat = retry_io(tar_path.stat)
            index_stat = retry_io(lambda: path.stat() if path.exists() else None)
        except OSError as error:
            raise ManifestError(f"shard {tar_path}: cannot be read: {error.strerror}") from error
        if index_stat is None:
            raise ManifestError(f"shard {tar_path} has no index; {remedy}")
        index = cls.read(tar_path)
        if tar_stat.st_size < index.tar_bytes and not _has_end_mark(tar_path, tar_stat.st_size):
            raise ManifestError(
                f"shard {tar_path}: truncated: ends at byte {tar_stat.st_size} without an end mark, its index was made "
                f"for {index.tar_bytes} bytes; copy the tar again"
            )
        if index.tar_bytes != tar_stat.st_size:
            raise ManifestError(
                f"shard {tar_path}: its index is stale: made for {index.tar_bytes} bytes, "
                f"the tar has {tar_stat.st_size}; {remedy}"
            )
        if tar_stat.st_mtime_ns > index_stat.st_mtime_ns:
            if _digest(tar_path, tar_stat.st_size, tar_stat.st_mtime_ns) != index.tar_sha256:
                raise ManifestError(f"shard {tar_path}: its index is stale: the content of the tar changed; {remedy}")
            _renew(path)
        return index

    @classmethod
    def read(cls, tar_path: Path) -> ShardIndex:
        """Map the index of ``tar_path`` without checking the tar, for callers that read all of it, or none of it.

        Raises:
            ManifestError: the index is missing or damaged.
        """
        return cls.map(index_path(tar_path), tar_path)

    @classmethod
    def map(cls, file: Path, tar_path: Path | Url, display_name: str = "") -> ShardIndex:
        """Map the index stored in ``file``, for example the cached index of a remote tar.

        Raises:
            ManifestError: it is missing or damaged. The message names ``display_name``, else the index of ``tar_path``.
        """
        path = display_name or f"{tar_path}{_SUFFIX}"
        columns = read_columns(file, _COLUMNS, INDEX_FORMAT, path, optional=(_CHECKSUM, *_OF_CLIPS))
        record, arrays = columns.record, columns.arrays
        try:
            extensions = tuple(str(ext) for ext in record["extensions"])
            digest = bytes.fromhex(record["tar_sha256"]).hex()
            if len(digest) != 2 * hashlib.sha256().digest_size:
                raise ValueError(f"tar_sha256 is {digest!r}")
            index = cls(tar_path, int(record["tar_bytes"]), digest, extensions, arrays)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ManifestError(f"{path}: damaged index: {error!r}") from error
        _check_lengths(path, arrays)
        return index

    @property
    def display_name(self) -> str:
        """The index's name in messages."""
        return f"{self.tar_path}{_SUFFIX}"

    def __len__(self) -> int:
        return len(self._arrays["cu_members"]) - 1

    def row(self, i: int) -> IndexedSample:
        """Return the entry of sample ``i`` after verifying the row's checksum, if the index has checksums.

        Args:
            i: Number of the sample in the shard, from 0. Negative numbers are not supported.

        Raises:
            ManifestError: the row is damaged.
            IndexError: ``i`` is not below the number of samples.
        """
        views = self._views
        rows, tar_bytes = range(views["cu_members"][i], views["cu_members"][i + 1]), self.tar_bytes
        exts, offsets, sizes = views["ext"], views["offset"], views["size"]
        crc32s, widths, heights = views["crc32"], views["width"], views["height"]
        of_media = [views[name] for name in _OF_CLIPS if name in views]
        found, previous_end = [], 0
        try:
            for row in rows:
                offset, size = offsets[row], sizes[row]
                if offset < previous_end or size < 0:
                    break
                previous_end = offset + size
                ext = self.extensions[exts[row]]
                media = [column[row] for column in of_media]
                found.append(Member(ext, offset, size, crc32s[row], widths[row], heights[row], *media))
        except IndexError as error:
            raise self._damaged(f"sample {i} has the members {rows.start}:{rows.stop}: {error}") from error
        if len(found) < len(rows) or not found or rows.start < 0 or previous_end > tar_bytes:
            raise self._damaged(f"sample {i} has no member, or one outside the {tar_bytes} bytes of the tar")
        first, end, num_bytes = views["cu_key_bytes"][i], views["cu_key_bytes"][i + 1], len(views["key_bytes"])
        if not 0 <= first <= end <= num_bytes:
            raise self._damaged(f"the key of sample {i} is at bytes {first}:{end} of {num_bytes}")
        key, text_bytes = views["key_bytes"][first:end], views["text_bytes"][i]
        if _CHECKSUM in views and views[_CHECKSUM][i] != _row_crc32(key, text_bytes, found):
            raise self._damaged(f"the row of sample {i} does not match its checksum")
        return IndexedSample(str(key, "utf-8", "replace"), found, text_bytes)

    @property
    def has_sounds(self) -> bool:
        """Whether ``Member.samples`` is known. Earlier versions did not look for the sound tracks of videos."""
        return "samples" in self._arrays

    def check(self) -> None:
        """Verify every row.

        Raises:
            ManifestError: a row points outside the tar or the columns, or does not match its checksum.
        """
        _check_rows(self.display_name, self._arrays, self.tar_bytes, len(self.extensions))
        for i in range(len(self)):
            self.row(i)

    @cached_property
    def _views(self) -> dict[str, memoryview]:
        """The columns as memoryviews, which return a Python integer in a third of numpy's time."""
        return {name: array.data for name, array in self._arrays.items()}

    @cached_property
    def _checked(self) -> dict[str, Column]:
        self.check()
        return self._arrays

    def _damaged(self, what: str) -> ManifestError:
        return ManifestError(f"{self.display_name}: damaged index: {what}; build it with: mmscale data index")

    def column(self, name: str) -> Column:
        """Return a whole read-only column; the first call runs ``check``.

        Members have the columns ``ext offset size crc32 width height``, and ``num_frames microseconds samples rate
        channels`` in a shard with videos or sounds. ``ext`` indexes ``extensions``. Samples have ``text_bytes``, and
        ``cu_members``: the number of members before each sample, then the total.

        Raises:
            ManifestError: any row of the index is damaged, or an index of an earlier version lacks the column.
        """
        if name not in self._checked:
            raise ManifestError(
                f"{self.display_name}: an index of an earlier version, without {name} of clips; build it again with: "
                "mmscale data index"
            )
        return self._checked[name]


def _check_lengths(path: str, arrays: dict[str, Column]) -> None:
    num_members, num_samples = len(arrays["offset"]), len(arrays["cu_members"]) - 1
    of_members = ("ext", "size", "crc32", "width", "height", *(name for name in _OF_CLIPS if name in arrays))
    per_member = all(len(arrays[name]) == num_members for name in of_members)
    per_sample = all(len(arrays[name]) == num_samples for name in ("text_bytes", _CHECKSUM) if name in arrays)
    if num_samples < 0 or not per_member or not per_sample or len(arrays["cu_key_bytes"]) != num_samples + 1:
        raise ManifestError(f"{path}: damaged index: columns of unequal length")


def _check_rows(path: str, arrays: dict[str, Column], tar_bytes: int, num_extensions: int) -> None:
    """Raise if an offset points outside the tar or the columns, or if members overlap or are out of order."""
    check_offsets(arrays["cu_members"], len(arrays["offset"]), f"{path}: cu_members")
    check_offsets(arrays["cu_key_bytes"], len(arrays["key_bytes"]), f"{path}: cu_key_bytes")
    offset, size = arrays["offset"], arrays["size"]
    # Compare by subtraction: offset + size of a hostile file could overflow.
    inside = (offset >= 0) & (size >= 0) & (offset <= tar_bytes) & (size <= tar_bytes - offset)
    ordered = np.all(offset[1:] >= offset[:-1] + size[:-1]) if inside.all() else False
    if not inside.all() or not ordered:
        raise ManifestError(f"{path}: damaged index: members overlap or exceed the {tar_bytes} bytes of the tar")
    if np.any(arrays["ext"] >= num_extensions) or np.any(arrays["cu_members"][1:] == arrays["cu_members"][:-1]):
        raise ManifestError(f"{path}: damaged index: an unknown extension or a sample without members")


def _row_crc32(key: Buffer, text_bytes: int, members: Iterable[Member]) -> int:
    value = crc32(key, crc32(_TEXT_BYTES.pack(text_bytes)))
    for member in members:
        value = crc32(_MEMBER.pack(*member[1:6]), crc32(member.ext.encode(), value))
        if any(member[6:8]):
            value = crc32(_VIDEO.pack(*member[6:8]), value)
        if any(member[8:]):
            value = crc32(_SOUND.pack(*member[8:]), value)
    return value


def _has_end_mark(tar_path: Path, size: int) -> bool:
    """Return whether the file ends with the end mark of a tar, two zero blocks. A truncated tar rarely does."""

    def end() -> bytes:
        with open_regular(tar_path) as file:
            file.seek(max(0, size - _END_MARK_BYTES))
            return file.read(_END_MARK_BYTES)

    try:
        return retry_io(end) == bytes(_END_MARK_BYTES)
    except OSError as error:
        raise ManifestError(f"shard {tar_path}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=1 << 14)
def _digest(tar_path: Path, size: int, mtime_ns: int) -> str:
    """Return the digest of a tar, cached per process by size and modification time.

    On a read-only data set ``_renew`` fails, so without this cache each ``open`` would read the whole tar again.
    """
    try:
        return retry_io(lambda: sha256_of(tar_path))
    except OSError as error:
        raise ManifestError(f"shard {tar_path}: cannot be read: {error.strerror}") from error


def _renew(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # The data set is read-only, so the next process computes the digest again.
        return


def scan_samples(data: memoryview, shard: str) -> Iterator[IndexedSample]:
    """Yield the samples of a tar, grouped by webdataset's rule: consecutive members with equal keys form a sample.

    Members without an extension are skipped, as in webdataset.

    Args:
        data: The whole tar.
        shard: Its name in messages.

    Raises:
        ShardError: the tar is damaged or hostile, a key occurs again later, an extension occurs twice in a sample, or a
            member is compressed.
    """
    seen: set[str] = set()
    key, members, texts = "", list[Member](), dict[str, bytes]()
    for member in walk(data, shard):
        name = split_name(member.name)
        if name is None:
            continue
        if name[0] != key or not members:
            if members:
                yield IndexedSample(key, members, text_bytes_of(texts))
            key, members, texts = name[0], [], {}
            if key in seen:
                raise ShardError(f"{shard}: the key {key!r} occurs twice (byte {member.header_offset})")
            seen.add(key)
        ext = name[1]
        if is_compressed(ext):
            raise ShardError(
                f"{shard}: {member.name!r} at byte {member.header_offset} is compressed, and training reads no "
                "compressed members; mmscale data ingest stores it uncompressed"
            )
        if any(ext == other.ext for other in members):
            raise ShardError(f"{shard}: sample {key!r} has two members .{ext} (byte {member.header_offset})")
        content = data[member.offset : member.offset + member.size]
        members.append(describe_member(ext, member.offset, content))
        if ext in ("txt", "json"):
            texts[ext] = bytes(content)
    if members:
        yield IndexedSample(key, members, text_bytes_of(texts))


@lru_cache(maxsize=1024)  # Called for every member of every sample.
def is_compressed(ext: str) -> bool:
    """Return whether an extension is that of a gzipped medium, text or JSON, which training does not read."""
    inner = ext.removesuffix(".gz")
    return inner != ext and (media_kind(inner) is not None or inner in ("txt", "json"))


def describe_member(ext: str, offset: int, content: bytes | memoryview) -> Member:
    """Return the index entry of a member, with its checksum and, for an image, video or sound, its size."""
    of_header: tuple[int, ...] = (0, 0)
    with contextlib.suppress(SampleError):  # Index damaged media too; ``verify`` and the fault policy handle them.
        kind = media_kind(ext)
        if kind == "image":
            image = image_size(content)
            of_header = (image.width, image.height)
        elif kind == "video":
            frames, microseconds, height, width = video_size(content)
            of_header = (width, height, frames, microseconds, *track_size(content))
        elif kind == "audio":
            of_header = (0, 0, 0, 0, *audio_size(content))
    return Member(ext, offset, len(content), crc32(content), *of_header)


def build_index(tar_path: str | Path, display_name: str = "") -> ShardIndex:
    """Read a tar and write its index atomically.

    Args:
        tar_path: The tar.
        display_name: Its name in messages, if it is a local copy.

    Raises:
        ShardError: the tar is missing, damaged or hostile. No index is written.
    """
    tar_path = Path(tar_path)
    digest, samples, size = hashlib.sha256(), list[IndexedSample](), 0
    with open_tar(tar_path) as data:
        size = len(data)
        for start in range(0, size, _CHUNK_BYTES):
            digest.update(data[start : start + _CHUNK_BYTES])
        samples.extend(scan_samples(data, display_name or str(tar_path)))
    write_index(tar_path, samples, size, digest.hexdigest())
    return ShardIndex.read(tar_path)


def write_index(tar_path: Path, samples: list[IndexedSample], tar_bytes: int, tar_sha256: str) -> None:
    """Write the index of a tar atomically, from known samples. Equal tars give byte-identical indexes.

    Raises:
        ShardError: the members have more different extensions than the format can number.
    """
    arrays, extensions = _arrays_of(samples, str(tar_path))
    record = {
        "format": INDEX_FORMAT,
        "tar_bytes": tar_bytes,
        "tar_sha256": tar_sha256,
        "extensions": extensions,
    }
    write_columns(index_path(tar_path), arrays, record)


def _arrays_of(samples: list[IndexedSample], shard: str) -> tuple[dict[str, Column], list[str]]:
    members = [member for sample in samples for member in sample.members]
    extensions = sorted({member.ext for member in members})
    if len(extensions) >= _MAX_EXTENSIONS:
        raise ShardError(
            f"{shard}: {len(extensions)} different extensions, the limit is {_MAX_EXTENSIONS - 1}; "
            "check the names of the members"
        )
    number = {ext: i for i, ext in enumerate(extensions)}
    key_bytes, cu_key_bytes = pack_strings([sample.key for sample in samples])
    arrays: dict[str, Column] = {
        "cu_members": np.cumsum([0, *(len(sample.members) for sample in samples)], dtype=np.int64),
        "key_bytes": key_bytes,
        "cu_key_bytes": cu_key_bytes,
        "text_bytes": np.array([sample.text_bytes for sample in samples], np.int64),
        _CHECKSUM: np.array([_row_crc32(s.key.encode(), s.text_bytes, s.members) for s in samples], np.uint32),
        "ext": np.array([number[member.ext] for member in members], np.uint16),
    }
    has_media = any(media_kind(ext) in ("video", "audio") for ext in extensions)
    of_media = _OF_CLIPS if has_media else ()
    for name in ("offset", "size", "crc32", "width", "height", *of_media):
        dtype = np.dtype(_COLUMNS[name][0])
        arrays[name] = np.array([getattr(member, name) for member in members], dtype)
    return arrays, extensions
