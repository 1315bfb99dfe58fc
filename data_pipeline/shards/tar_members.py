"""Parse the headers of a tar and report the byte offset of each defect.

The index builder, ``verify`` and ``tar_stream`` use this parser instead of Python's ``tarfile``. ``tarfile`` treats a
damaged header as the end of the archive, so a shard that lost half of its samples would pass. It also recurses into
extended headers without a limit, and raises arbitrary exceptions on damaged attributes. ``walk`` raises ``TarError`` at
the first defect; ``survey`` yields each defect and continues.
"""

from __future__ import annotations

import mmap
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import ShardError
from data_pipeline.io.untrusted import open_regular

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_MAX_NAME_BYTES = 1 << 16
_GNU_LONG_NAME, _PAX, _PAX_GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE
_REJECTED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link with a long target",
}
_WITHOUT_CONTENT = frozenset(
    {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE}
)
"""Types whose size field is ignored, as in POSIX and Python's ``tarfile``."""
# Forms of the checksum field: six octal digits (GNU tar, Python, libarchive, Go and, with another end, node-tar), or
# seven (Rust).
_CHECKSUM_FORM = re.compile(rb"[0-7]{6}(\0 | \0)|[0-7]{7}[\0 ]")
_WEBDATASET_METADATA = re.compile(r"__[^/]*__($|/)")
# webdataset's rule: the key ends at the first dot of the base name.
_KEY_AND_EXT = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class TarFault(str, Enum):
    """Kinds of defects in a tar."""

    TRUNCATED = "truncated"
    """The tar ends before its end mark, or inside a member."""
    HEADER = "header"
    """A damaged header, one of an unknown type, or a damaged block of attributes."""
    PATH = "path"
    """A name that points outside the shard, or is not valid UTF-8."""
    LINK = "link"
    """A link, a device, a pipe or a sparse file."""
    TAIL = "tail"
    """Data after the end mark."""
    SLACK = "slack"
    """A byte without meaning that differs from what tar writers store there. ``walk`` ignores it."""


class TarError(ShardError):
    """A damaged or hostile tar.

    Args:
        message: Description of the defect, with file and offset.
        offset: Offset of the defective header or byte.
        fault: Kind of the defect.
        following: Offset of the next header; None if it is unknown.
        name: Name of the member, as far as it can be read.
    """

    def __init__(
        self,
        message: str,
        offset: int = 0,
        fault: TarFault = TarFault.HEADER,
        following: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__(message)
        self.offset = offset
        self.fault = fault
        self.following = following
        self.name = name


@dataclass(frozen=True)
class TarMember:
    """A regular file inside a tar. ``offset`` is that of its content; both offsets count from the start of the tar."""

    name: str
    header_offset: int
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into (key, extension in lower case), as webdataset does.

    ``a/000.0.PNG`` gives ``("a/000", "0.png")``. Returns None if the name has no extension, or is one of webdataset's
    metadata files (``__NAME__``).
    """
    match = None if _WEBDATASET_METADATA.match(name) else _KEY_AND_EXT.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def walk(data: memoryview, shard: str) -> Iterator[TarMember]:
    """Yield the regular files of a tar in order; skip folders.

    Args:
        data: The whole tar, usually mapped.
        shard: Its name in messages.

    Raises:
        TarError: at the first defect of any kind but ``SLACK``. The message names file and offset.
    """
    for found in survey(data, shard):
        if isinstance(found, TarMember):
            yield found
        elif found.fault is not TarFault.SLACK:
            raise found


NextIndexedMember = Callable[[int], TarMember | None]
"""Returns the first member in the index whose content starts after an offset; None if there is none."""


def survey(
    data: memoryview, shard: str, indexed: NextIndexedMember = lambda at: None
) -> Iterator[TarMember | TarError]:
    """Yield the members of ``walk`` and, in between, each defect; continue after a defect if possible.

    After a damaged header, the parser resumes at the next valid header, or at the next member of the index if that
    comes first. The index thereby recovers a member whose header is lost. After a truncation, the iteration ends.

    Args:
        data: The whole tar.
        shard: Its name in messages.
        indexed: Looks up members in the index, if there is one.
    """
    at: int | None = 0
    attributes = Attributes()
    while at is not None:
        try:
            header = _parse_at(data, at, shard, attributes)
        except TarError as error:
            yield error
            if error.fault is TarFault.TRUNCATED:
                return
            at, member = (error.following, None) if error.following else _resume(data, at, indexed)
            attributes = Attributes()
        else:
            if header is None:
                stray = _first_nonzero(data, at)
                if stray is None:
                    return
                end_mark, (at, member) = at, _resume(data, at, indexed)
                yield _data_after_end_mark(shard, end_mark, stray, is_header_lost=at is not None)
            else:
                yield from _slack(data, at, header, shard)
                at, member = header.following, header.member
        if member is not None:
            yield member


@dataclass
class Attributes:
    """Name and attributes from extended headers, which apply to the next member."""

    long_name: str = ""
    pax: dict[str, str] = field(default_factory=dict)


class ParsedHeader(NamedTuple):
    """Extent and member of one header.

    Attributes:
        content_end: End offset of the content.
        following: Offset of the next header.
        member: None for folders and extended headers.
    """

    content_end: int
    following: int
    member: TarMember | None


def _parse_at(data: memoryview, at: int, shard: str, attributes: Attributes) -> ParsedHeader | None:
    """Parse the header at an offset; return None at the end mark. Changes ``attributes``."""
    start = at + BLOCK_BYTES
    if start > len(data):
        message = (
            f"{shard}: truncated: ends at byte {len(data)} without an end mark (header due at {at}); copy it again"
        )
        raise TarError(message, at, TarFault.TRUNCATED)

    def content(size: int) -> bytes:
        return bytes(data[start : start + size])

    return parse_header(bytes(data[at:start]), content, at, shard, attributes, most_bytes=len(data) - start)


def parse_header(
    block: bytes, content: Callable[[int], bytes], at: int, shard: str, attributes: Attributes, most_bytes: int
) -> ParsedHeader | None:
    """Parse one header; return None if it is a block of the end mark.

    Args:
        block: The 512 bytes of the header.
        content: Returns the given number of bytes after the header. Called for extended headers only, with a bounded
            number.
        at: Offset of the header.
        shard: The tar's name in messages.
        attributes: Attributes for this header. An extended header fills them in place, a global one is ignored, and
            any other header clears them.
        most_bytes: Upper bound on the size of the content.

    Raises:
        TarError: the header is damaged or hostile, its content is larger than ``most_bytes``, or it belongs to anything
            but a regular file or folder.
    """
    if block == _ZEROS:
        return None
    header = _header(block, shard, at)
    name = attributes.pax.get("path") or attributes.long_name or header.name
    size = int(attributes.pax.get("size", header.size))
    start = at + BLOCK_BYTES
    if header.type in _WITHOUT_CONTENT:
        size = 0
    if not 0 <= size <= most_bytes:
        message = f"{shard}: truncated: {name!r} at byte {at} claims {size} bytes, {most_bytes} are left"
        raise TarError(message, at, TarFault.TRUNCATED, name=name)
    following = _block_end(start + size)
    if header.type in (_GNU_LONG_NAME, _PAX, _PAX_GLOBAL):
        _read_attributes(header.type, size, content, attributes, shard, at, following)
        return ParsedHeader(start + size, following, None)
    _check_kind(header, name, shard, at, following)
    attributes.long_name, attributes.pax = "", {}
    if header.is_folder:
        return ParsedHeader(start + size, following, None)
    return ParsedHeader(start + size, following, TarMember(_safe_name(name, shard, at, following), at, start, size))


def _read_attributes(
    kind: bytes, size: int, content: Callable[[int], bytes], attributes: Attributes, shard: str, at: int, following: int
) -> None:
    if size > _MAX_NAME_BYTES:
        message = f"{shard}: a name or attribute block of {size} bytes at byte {at}"
        raise TarError(message, at, following=following)
    if (kind == _GNU_LONG_NAME and attributes.long_name) or (kind == _PAX and attributes.pax):
        message = f"{shard}: a second extended header at byte {at} for one member"
        raise TarError(message, at, following=following)
    if kind == _GNU_LONG_NAME:
        attributes.long_name = content(size).rstrip(b"\0").decode(errors="surrogateescape")
    elif kind == _PAX:
        attributes.pax = _pax_fields(content(size), shard, at, following)


def _block_end(offset: int) -> int:
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES


def _resume(data: memoryview, at: int, indexed: NextIndexedMember) -> tuple[int | None, TarMember | None]:
    """Return where to resume after a lost header: (offset of the next header, recovered member).

    The member is None if a valid header comes before the next indexed member. (None, None) if there is neither.
    """
    member = indexed(at)
    end = len(data) if member is None else min(member.offset, len(data))
    for candidate in range(at + BLOCK_BYTES, end - BLOCK_BYTES + 1, BLOCK_BYTES):
        if data[candidate + 257 : candidate + 262] == b"ustar" and _is_header(data, candidate):
            return candidate, None
    if member is None or member.offset + member.size > len(data):
        return None, None
    return _block_end(member.offset + member.size), member


def _is_header(data: memoryview, at: int) -> bool:
    try:
        _header(bytes(data[at : at + BLOCK_BYTES]), "", at)
    except TarError:
        return False
    return True


def _data_after_end_mark(shard: str, at: int, stray: int, is_header_lost: bool) -> TarError:
    if is_header_lost:
        return TarError(f"{shard}: an end mark at byte {at} and members after it: the tar was damaged or joined", at)
    message = f"{shard}: data after the end mark at byte {stray}: the tar was damaged or joined"
    return TarError(message, stray, TarFault.TAIL)


def _slack(data: memoryview, at: int, header: ParsedHeader, shard: str) -> Iterator[TarError]:
    name = header.member.name if header.member is not None else ""
    stored = bytes(data[at + 148 : at + 156])
    if data[at + 257 : at + 262] == b"ustar" and _CHECKSUM_FORM.fullmatch(stored) is None:
        message = f"{shard}: the checksum of the header at byte {at} is written {stored!r}"
        yield TarError(message, at, TarFault.SLACK, name=name)
    padding = bytes(data[header.content_end : min(header.following, len(data))])
    if padding.count(0) != len(padding):
        offset = header.following - len(padding.lstrip(b"\0"))
        message = f"{shard}: byte {offset} between two members is not zero"
        yield TarError(message, offset, TarFault.SLACK, name=name)


class _Header(NamedTuple):
    name: str
    size: int
    type: bytes

    @property
    def is_folder(self) -> bool:
        return self.type == tarfile.DIRTYPE or (self.type == tarfile.AREGTYPE and self.name.endswith("/"))


def _header(block: bytes, shard: str, at: int) -> _Header:
    """Parse name, size and type. ``tarfile.TarInfo.frombuf`` parses all fields and takes five times as long."""
    try:
        stored = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError as error:
        raise TarError(f"{shard}: bad header at byte {at}: {error}", at, name=_until_zero(block[:100])) from error
    # The checksum counts its own field as spaces.
    if stored != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise TarError(f"{shard}: bad header at byte {at}: bad checksum", at, name=_until_zero(block[:100]))
    name = _until_zero(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_until_zero(block[345:500])}/{name}"
    return _Header(name, size, block[156:157])


def _number(field: bytes) -> int:
    """Parse octal digits, or base 256 after a marker bit (GNU, for files of 8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not digits.isdigit() and digits:
        raise ValueError(f"expected an octal number, got {field!r}")
    return int(digits or b"0", 8)


def _until_zero(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _check_kind(header: _Header, name: str, shard: str, at: int, following: int) -> None:
    if header.type in _REJECTED:
        message = f"{shard}: {name!r} at byte {at} is {_REJECTED[header.type]}; shards hold plain files only"
        raise TarError(message, at, TarFault.LINK, following, name)
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        message = f"{shard}: {name!r} at byte {at} has the unknown type {header.type!r}"
        raise TarError(message, at, following=following, name=name)


def _safe_name(name: str, shard: str, at: int, following: int) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        message = f"{shard}: the name at byte {at} is not valid UTF-8: {name!a}"
        raise TarError(message, at, TarFault.PATH, following) from error
    name = name.removeprefix("./")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        message = f"{shard}: the name {name!r} at byte {at} points outside the shard"
        raise TarError(message, at, TarFault.PATH, following, name)
    return name


def _pax_fields(payload: bytes, shard: str, at: int, following: int) -> dict[str, str]:
    """Parse the records ``length key=value newline`` of a pax header. Callers use ``path`` and ``size`` only."""
    fields: dict[str, str] = {}
    while payload:
        digits, _, _ = payload.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        record, payload = payload[len(digits) + 1 : length - 1], payload[length:] if length else b""
        key, found, value = record.partition(b"=")
        if not found or (key == b"size" and not (value.isdigit() and len(value) < 20)):
            raise TarError(f"{shard}: damaged attributes at byte {at}", at, following=following)
        if key.startswith(b"GNU.sparse"):
            message = f"{shard}: a sparse file at byte {at}; shards hold plain files only"
            raise TarError(message, at, TarFault.LINK, following)
        fields[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
    return fields


_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class open_tar:  # noqa: N801 - reads like open()
    """Map a tar for reading: ``with open_tar(path) as data``, where ``data`` is a ``memoryview``.

    Raises:
        ShardError: the file is missing, unreadable, empty or compressed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> memoryview:
        try:
            with open_regular(self._path) as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise ShardError(f"{self._path}: this is an empty file, expected a tar")
                start = os.pread(file.fileno(), max(map(len, _COMPRESSIONS)), 0)
                compression = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)
                if compression is not None:
                    raise ShardError(
                        f"{self._path}: compressed with {compression}, so samples cannot be read one by one: "
                        "decompress it, or store it as shards with: mmscale data ingest"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ShardError(f"{self._path}: cannot be read: {error.strerror}") from error
        self._view = memoryview(self._map)
        return self._view

    def __exit__(self, *exc: Any) -> None:
        # Slices that an exception still references keep the map open until they are freed.
        self._view.release()


def _first_nonzero(data: memoryview, at: int) -> int | None:
    for start in range(at, len(data), 1 << 20):
        chunk = bytes(data[start : start + (1 << 20)])
        if chunk.count(0) != len(chunk):
            return start + len(chunk) - len(chunk.lstrip(b"\0"))
    return None
