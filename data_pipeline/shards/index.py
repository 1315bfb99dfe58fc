"""The sidecar index of a shard: where each member lies, without reading the tar.

    train-00000.tar  --build_index-->  train-00000.tar.index  --ShardIndex.open-->  spans for pread

The tar stays a plain webdataset tar. The index is a column file (``columns``) that is mapped, holds no timestamp (equal
tars give equal bytes) and knows size and sha256 of its tar, so that a stale one is noticed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import ManifestError, SampleError, ShardError
from data_pipeline.io.checksums import sha256_of
from data_pipeline.io.columns import Column, check_offsets, pack_strings, read_columns, write_columns
from data_pipeline.io.json_member import text_bytes_of
from data_pipeline.io.untrusted import open_regular
from data_pipeline.shards.image_header import Buffer, image_size, is_image
from data_pipeline.shards.tar_members import BLOCK_BYTES, split_name, walk
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
}
_CHECKSUM = "row_crc32"
"""CRC-32 of all that the index says of a sample. Indexes of earlier versions lack it and are read unchecked."""
_MEMBER = struct.Struct("<qqIII")
_TEXT_BYTES = struct.Struct("<q")
_MAX_EXTENSIONS = 1 << 16
_SUFFIX = ".index"
_CHUNK_BYTES = 1 << 24
_END_MARK_BYTES = 2 * BLOCK_BYTES


class Member(NamedTuple):
    """One file of a sample.

    Attributes:
        ext: Extension, lower case, as after the key: ``jpg``, ``0.png``, ``json``.
        offset: First byte inside the tar.
        size: Bytes.
        crc32: CRC-32 of those bytes, as ``zlib`` has it.
        width, height: Pixels of an image as shown (EXIF rotation applied), from its header; 0 for anything else and for
            a damaged header.
    """

    ext: str
    offset: int
    size: int
    crc32: int
    width: int
    height: int


class IndexedSample(NamedTuple):
    """What an index says of one sample.

    Attributes:
        key: Its name in the tar.
        members: Its files in the order of the tar; they lie inside of it one after the other, at least one.
        text_bytes: UTF-8 bytes of text that it shows: its page, or dialogue and caption (the longest of several).
    """

    key: str
    members: list[Member]
    text_bytes: int


def index_path(tar_path: Path) -> Path:
    """The sidecar of a tar: ``X.tar.index``."""
    return tar_path.with_name(tar_path.name + _SUFFIX)


def index_url(tar: Url) -> Url:
    """The sidecar of a remote tar."""
    return Url(f"{tar}{_SUFFIX}")


def extent(members: Sequence[Member]) -> tuple[int, int]:
    """Bytes [first, end) of the tar that hold all members of a sample, in the order of the tar."""
    return members[0].offset, members[-1].offset + members[-1].size


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds. Opened with ``ShardIndex.open``; memory is shared between processes by the system.

    Opening touches a page or two, since an order may take a handful of samples out of each of a million shards: a row
    is compared with its own checksum when it is asked for, and ``check`` looks at all of them.

    Attributes:
        tar_path: The shard; a URL if it is remote.
        tar_bytes: Its size.
        tar_sha256: Its digest when the index was built, hexadecimal.
        extensions: Extensions that occur.
    """

    tar_path: Path | Url
    tar_bytes: int
    tar_sha256: str
    extensions: tuple[str, ...]
    _arrays: dict[str, Column] = field(repr=False)

    @classmethod
    def open(cls, tar_path: str | Path) -> ShardIndex:
        """Maps the index of ``tar_path`` and checks that it still describes the tar.

        A tar of another size is refused. If the tar is newer than its index (a copy or a checkout does that too), the
        digest decides; where it is equal the index's own time is renewed, so the next opening is quick.

        Raises:
            ManifestError: index or tar is missing, or the index is damaged or stale. Names the shard and the remedy.
        """
        tar_path = Path(tar_path)
        path = index_path(tar_path)
        remedy = f"build it with: mmscale data index {tar_path}"
        try:
            tar_stat = tar_path.stat()
        except OSError as error:
            raise ManifestError(f"shard {tar_path}: cannot be read: {error.strerror}") from error
        if not path.exists():
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
        if tar_stat.st_mtime_ns > path.stat().st_mtime_ns:
            if _digest(tar_path, tar_stat.st_size, tar_stat.st_mtime_ns) != index.tar_sha256:
                raise ManifestError(f"shard {tar_path}: its index is stale: the content of the tar changed; {remedy}")
            _renew(path)
        return index

    @classmethod
    def read(cls, tar_path: Path) -> ShardIndex:
        """Maps the index of ``tar_path`` without a look at the tar: for a caller that reads the whole tar anyway.

        Raises:
            ManifestError: the index is missing or damaged.
        """
        return cls.map(index_path(tar_path), tar_path)

    @classmethod
    def map(cls, file: Path, tar_path: Path | Url, shown: str = "") -> ShardIndex:
        """Maps an index that lies in ``file``, a copy of the one of a remote tar for instance.

        Raises:
            ManifestError: it is missing or damaged.
        """
        path = shown or f"{tar_path}{_SUFFIX}"
        columns = read_columns(file, _COLUMNS, INDEX_FORMAT, path, optional=(_CHECKSUM,))
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
    def shown(self) -> str:
        """What messages call the index."""
        return f"{self.tar_path}{_SUFFIX}"

    def __len__(self) -> int:
        return len(self._arrays["cu_members"]) - 1

    def row(self, i: int) -> IndexedSample:
        """All that the index says of sample ``i``, compared with the checksum of the row.

        Raises:
            ManifestError: the row is damaged.
        """
        views = self._views
        rows, tar_bytes = range(views["cu_members"][i], views["cu_members"][i + 1]), self.tar_bytes
        exts, offsets, sizes = views["ext"], views["offset"], views["size"]
        crc32s, widths, heights = views["crc32"], views["width"], views["height"]
        found, behind = [], 0
        try:
            for row in rows:
                offset, size = offsets[row], sizes[row]
                if offset < behind or size < 0:
                    break
                behind = offset + size
                ext = self.extensions[exts[row]]
                found.append(Member(ext, offset, size, crc32s[row], widths[row], heights[row]))
        except IndexError as error:
            raise self._damaged(f"sample {i} has the members {rows.start}:{rows.stop}: {error}") from error
        if len(found) < len(rows) or not found or rows.start < 0 or behind > tar_bytes:
            raise self._damaged(f"a member of sample {i} lies outside the {tar_bytes} bytes of the tar, or none does")
        first, end, num_bytes = views["cu_key_bytes"][i], views["cu_key_bytes"][i + 1], len(views["key_bytes"])
        if not 0 <= first <= end <= num_bytes:
            raise self._damaged(f"the key of sample {i} lies at bytes {first}:{end} of {num_bytes}")
        key, text_bytes = views["key_bytes"][first:end], views["text_bytes"][i]
        if _CHECKSUM in views and views[_CHECKSUM][i] != _row_crc32(key, text_bytes, found):
            raise self._damaged(f"what it says of sample {i} does not fit the row's checksum")
        return IndexedSample(str(key, "utf-8", "replace"), found, text_bytes)

    def check(self) -> None:
        """Looks at every row.

        Raises:
            ManifestError: one points outside the tar or the columns.
        """
        _check_rows(self.shown, self._arrays, self.tar_bytes, len(self.extensions))
        for i in range(len(self)):
            self.row(i)

    @cached_property
    def _views(self) -> dict[str, memoryview]:
        """The columns for single numbers: a memoryview gives a Python integer in a third of numpy's time."""
        return {name: array.data for name, array in self._arrays.items()}

    @cached_property
    def _checked(self) -> dict[str, Column]:
        self.check()
        return self._arrays

    def _damaged(self, what: str) -> ManifestError:
        return ManifestError(f"{self.shown}: damaged index: {what}; build it with: mmscale data index")

    def column(self, name: str) -> Column:
        """A whole column, read-only: ``ext offset size crc32 width height`` per member, ``text_bytes`` per sample.

        Raises:
            ManifestError: any row of the index is damaged.
        """
        return self._checked[name]


def _check_lengths(path: str, arrays: dict[str, Column]) -> None:
    num_members, num_samples = len(arrays["offset"]), len(arrays["cu_members"]) - 1
    per_member = all(len(arrays[name]) == num_members for name in ("ext", "size", "crc32", "width", "height"))
    per_sample = all(len(arrays[name]) == num_samples for name in ("text_bytes", _CHECKSUM) if name in arrays)
    if num_samples < 0 or not per_member or not per_sample or len(arrays["cu_key_bytes"]) != num_samples + 1:
        raise ManifestError(f"{path}: damaged index: columns of unequal length")


def _check_rows(path: str, arrays: dict[str, Column], tar_bytes: int, num_extensions: int) -> None:
    """Nothing in the file may point outside the tar or the columns."""
    check_offsets(arrays["cu_members"], len(arrays["offset"]), f"{path}: cu_members")
    check_offsets(arrays["cu_key_bytes"], len(arrays["key_bytes"]), f"{path}: cu_key_bytes")
    offset, size = arrays["offset"], arrays["size"]
    # Compare by subtraction: offset + size of a hostile file could overflow.
    inside = (offset >= 0) & (size >= 0) & (offset <= tar_bytes) & (size <= tar_bytes - offset)
    ordered = np.all(offset[1:] >= offset[:-1] + size[:-1]) if inside.all() else False
    if not inside.all() or not ordered:
        raise ManifestError(f"{path}: damaged index: a member lies outside the {tar_bytes} bytes of the tar")
    if np.any(arrays["ext"] >= num_extensions) or np.any(arrays["cu_members"][1:] == arrays["cu_members"][:-1]):
        raise ManifestError(f"{path}: damaged index: an unknown extension or a sample without members")


def _row_crc32(key: Buffer, text_bytes: int, members: Iterable[Member]) -> int:
    value = crc32(key, crc32(_TEXT_BYTES.pack(text_bytes)))
    for ext, *numbers in members:
        value = crc32(_MEMBER.pack(*numbers), crc32(ext.encode(), value))
    return value


def _has_end_mark(tar_path: Path, size: int) -> bool:
    """Whether a tar ends as a whole one does, in two blocks of zeros: then it is another tar, not a part of one."""
    try:
        with open_regular(tar_path) as file:
            file.seek(max(0, size - _END_MARK_BYTES))
            return file.read(_END_MARK_BYTES) == bytes(_END_MARK_BYTES)
    except OSError as error:
        raise ManifestError(f"shard {tar_path}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=1 << 14)
def _digest(tar_path: Path, size: int, mtime_ns: int) -> str:
    """Digest of a tar, once a process while size and time stay: on a read-only data set no index can be renewed."""
    return sha256_of(tar_path)


def _renew(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # A read-only data set: the next process computes the digest again.
        return


def scan_samples(data: memoryview, shard: str) -> Iterator[IndexedSample]:
    """Groups the members of a tar into samples by webdataset's rule: neighbours with one key.

    Members without an extension are passed over, as webdataset does.

    Raises:
        ShardError: the tar is damaged or hostile, a key comes back later, or an extension occurs twice in a sample.
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
                raise ShardError(f"{shard}: the key {key!r} comes twice (byte {member.header_offset})")
            seen.add(key)
        ext = name[1]
        if is_packed(ext):
            raise ShardError(
                f"{shard}: {member.name!r} at byte {member.header_offset} is compressed, and training unpacks nothing; "
                "mmscale data ingest stores it unpacked"
            )
        if any(ext == other.ext for other in members):
            raise ShardError(f"{shard}: sample {key!r} has two members .{ext} (byte {member.header_offset})")
        content = data[member.offset : member.offset + member.size]
        members.append(describe_member(ext, member.offset, content))
        if ext in ("txt", "json"):
            texts[ext] = bytes(content)
    if members:
        yield IndexedSample(key, members, text_bytes_of(texts))


@lru_cache(maxsize=1024)  # Asked for every member of every sample.
def is_packed(ext: str) -> bool:
    """Whether a member is a compressed image, text or JSON: training unpacks nothing."""
    unpacked = ext.removesuffix(".gz")
    return unpacked != ext and (is_image(unpacked) or unpacked in ("txt", "json"))


def describe_member(ext: str, offset: int, content: bytes | memoryview) -> Member:
    """What the index says of a member: checksum, and the size of an image from its header."""
    width, height = _size_or_zero(content) if is_image(ext) else (0, 0)
    return Member(ext, offset, len(content), crc32(content), width, height)


def _size_or_zero(content: bytes | memoryview) -> tuple[int, int]:
    try:
        size = image_size(content)
        return size.width, size.height
    except SampleError:  # The index records what is there; verify and the fault policy deal with it.
        return 0, 0


def build_index(tar_path: str | Path, shown: str = "") -> ShardIndex:
    """Reads a tar once and writes its sidecar, whole or not at all.

    Args:
        tar_path: The tar.
        shown: What messages call it, if it is a copy of another.

    Raises:
        ShardError: the tar is missing, damaged or hostile; no index is written.
    """
    tar_path = Path(tar_path)
    digest, samples, size = hashlib.sha256(), list[IndexedSample](), 0
    with open_tar(tar_path) as data:
        size = len(data)
        for start in range(0, size, _CHUNK_BYTES):
            digest.update(data[start : start + _CHUNK_BYTES])
        samples.extend(scan_samples(data, shown or str(tar_path)))
    write_index(tar_path, samples, size, digest.hexdigest())
    return ShardIndex.read(tar_path)


def write_index(tar_path: Path, samples: list[IndexedSample], tar_bytes: int, tar_sha256: str) -> None:
    """Writes the sidecar of a tar whose content is known, whole or not at all; equal tars give equal bytes."""
    arrays, extensions = _arrays_of(samples, str(tar_path))
    record = {
        "format": INDEX_FORMAT,
        "tar_bytes": tar_bytes,
        "tar_sha256": tar_sha256,
        "extensions": extensions,
    }
    write_columns(index_path(tar_path), arrays, record)


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class open_tar:  # noqa: N801 - reads like open()
    """Maps a tar for reading: ``with open_tar(path) as data: memoryview``.

    Raises:
        ShardError: the file is missing, unreadable, empty or compressed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> memoryview:
        try:
            with open_regular(self._path) as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise ShardError(f"{self._path}: an empty file, no tar")
                start = os.pread(file.fileno(), max(map(len, _PACKED)), 0)
                packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
                if packed is not None:
                    raise ShardError(
                        f"{self._path}: compressed with {packed}, so no sample can be read by itself: unpack it, or "
                        "store it as shards with: mmscale data ingest"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ShardError(f"{self._path}: cannot be read: {error.strerror}") from error
        self._view = memoryview(self._map)
        return self._view

    def __exit__(self, *exc: Any) -> None:
        # Slices that an exception still holds keep the map alive; it goes with the last of them.
        self._view.release()


def _arrays_of(samples: list[IndexedSample], shard: str) -> tuple[dict[str, Column], list[str]]:
    members = [member for sample in samples for member in sample.members]
    extensions = sorted({member.ext for member in members})
    if len(extensions) >= _MAX_EXTENSIONS:
        raise ShardError(f"{shard}: {len(extensions)} different extensions; are the names right?")
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
    for name in ("offset", "size", "crc32", "width", "height"):
        dtype = np.dtype(_COLUMNS[name][0])
        arrays[name] = np.array([getattr(member, name) for member in members], dtype)
    return arrays, extensions
