"""Walks the headers of a tar and says exactly where it is damaged.

For: building an index, verifying a shard, and reading a stream. Python's ``tarfile`` takes a damaged header for the end
of the archive and stops, so a half-lost shard would pass; it recurses into extended headers without a bound; and it
raises whatever a damaged attribute leads to. ``walk`` raises a ``TarError`` instead, and ``survey`` continues after the
damage. Not for: extracting files.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from data_pipeline.errors import ShardError

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_MAX_NAME_BYTES = 1 << 16
_GNU_LONG_NAME, _PAX, _PAX_GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE
_REFUSED = {
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
"""Whatever size they claim: so POSIX has it, and so does Python's ``tarfile``."""
# Six digits as tar, Python, libarchive and Go write them, or as node-tar does; or seven, as Rust does.
_CHECKSUM_FORM = re.compile(rb"[0-7]{6}(\0 | \0)|[0-7]{7}[\0 ]")
_OF_WEBDATASET = re.compile(r"__[^/]*__($|/)")
# webdataset's rule: the key ends at the first dot of the base name.
_KEY_AND_EXT = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class TarFault(str, Enum):
    """What is wrong with a tar."""

    TRUNCATED = "truncated"
    """It ends before its end mark, or inside a member."""
    HEADER = "header"
    """A header or a block of attributes that does not fit its checksum, or is none."""
    PATH = "path"
    """A name that leaves the shard, or is no UTF-8."""
    LINK = "link"
    """A link, a device, a pipe, a sparse file: anything but a plain file or a folder."""
    TAIL = "tail"
    """Data behind the end mark."""
    SLACK = "slack"
    """A byte that means nothing, and differs from what every tool writes there; ``walk`` passes over it."""


class TarError(ShardError):
    """A damaged or hostile tar.

    Args:
        message: What was seen; names file and offset.
        offset: Byte of the header at fault.
        fault: What is wrong.
        following: Where the next header is due all the same; None if nobody can know.
        name: Of the member, as far as it can be read.
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
    """A regular file inside a tar; offsets in bytes from the start of the tar."""

    name: str
    header_offset: int
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member's name; None if it has no extension or is a note of webdataset's.

    ``a/000.0.PNG`` -> ``("a/000", "0.png")``, as webdataset does.
    """
    match = None if _OF_WEBDATASET.match(name) else _KEY_AND_EXT.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def walk(data: memoryview, shard: str) -> Iterator[TarMember]:
    """Regular files of a tar in order; folders are passed over.

    Args:
        data: The whole tar, usually mapped.
        shard: Its name, for messages.

    Raises:
        TarError: the tar is truncated, a header is damaged, a member is a link, a device or sparse, or a name
            would leave the folder. Names file and offset.
    """
    for found in survey(data, shard):
        if isinstance(found, TarMember):
            yield found
        elif found.fault is not TarFault.SLACK:
            raise found


Indexed = Callable[[int], TarMember | None]
"""Offset to the first member, as an index knows it, whose content starts behind it."""


def survey(data: memoryview, shard: str, indexed: Indexed = lambda at: None) -> Iterator[TarMember | TarError]:
    """What ``walk`` yields, and every damage in its place: goes on behind it where that is possible.

    Behind a damaged header the walk is taken up at the next block that is a sound one, or at the next member of the
    index if that comes first; so a member whose header is lost is found by its index.

    Args:
        data: The whole tar.
        shard: Its name, for messages.
        indexed: The index, if there is one.
    """
    at: int | None = 0
    attributes = Attributes()
    while at is not None:
        try:
            entry = _entry(data, at, shard, attributes)
        except TarError as error:
            yield error
            if error.fault is TarFault.TRUNCATED:
                return
            at, member = (error.following, None) if error.following else _regain(data, at, indexed)
            attributes = Attributes()
        else:
            if entry is None:
                stray = _first_nonzero(data, at)
                if stray is None:
                    return
                end_mark, (at, member) = at, _regain(data, at, indexed)
                yield _behind_end_mark(shard, end_mark, stray, is_header_lost=at is not None)
            else:
                yield from _slack(data, at, entry, shard)
                at, member = entry.following, entry.member
        if member is not None:
            yield member


@dataclass
class Attributes:
    """What extended headers say of the member behind them."""

    long_name: str = ""
    pax: dict[str, str] = field(default_factory=dict)


class Entry(NamedTuple):
    """One header with its content; ``member`` is None for folders and attributes."""

    content_end: int
    following: int
    member: TarMember | None


def _entry(data: memoryview, at: int, shard: str, attributes: Attributes) -> Entry | None:
    """The header at a byte, None at the end mark; changes ``attributes``."""
    start = at + BLOCK_BYTES
    if start > len(data):
        message = f"{shard}: truncated: ends at byte {len(data)} without an end mark (header due at {at})"
        raise TarError(message, at, TarFault.TRUNCATED)

    def content(size: int) -> bytes:
        return bytes(data[start : start + size])

    return parse_entry(bytes(data[at:start]), content, at, shard, attributes, most_bytes=len(data) - start)


def parse_entry(
    block: bytes, content: Callable[[int], bytes], at: int, shard: str, attributes: Attributes, most_bytes: int
) -> Entry | None:
    """One header.

    Args:
        block: Its 512 bytes.
        content: Gives the first bytes behind the header; called for names and attributes, whose size is bounded.
        at: Where the header starts.
        shard: The tar's name, for messages.
        attributes: Of the extended headers before it. Changed: filled by an extended header, emptied by any other.
        most_bytes: The most that the content can have.

    Returns:
        None at the end mark.

    Raises:
        TarError: the header is damaged, hostile, or no plain file or folder.
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
        return Entry(start + size, following, None)
    _check_kind(header, name, shard, at, following)
    attributes.long_name, attributes.pax = "", {}
    if header.is_folder:
        return Entry(start + size, following, None)
    return Entry(start + size, following, TarMember(_safe_name(name, shard, at, following), at, start, size))


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


def _regain(data: memoryview, at: int, indexed: Indexed) -> tuple[int | None, TarMember | None]:
    """Behind a lost header: the next header, or the next member of the index with what follows it."""
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


def _behind_end_mark(shard: str, at: int, stray: int, is_header_lost: bool) -> TarError:
    if is_header_lost:
        return TarError(f"{shard}: an end mark at byte {at} and members behind the end mark: damaged or joined", at)
    message = f"{shard}: data behind the end mark at byte {stray}: the tar was damaged or joined"
    return TarError(message, stray, TarFault.TAIL)


def _slack(data: memoryview, at: int, entry: Entry, shard: str) -> Iterator[TarError]:
    name = entry.member.name if entry.member is not None else ""
    stored = bytes(data[at + 148 : at + 156])
    if data[at + 257 : at + 262] == b"ustar" and _CHECKSUM_FORM.fullmatch(stored) is None:
        message = f"{shard}: the checksum of the header at byte {at} is written {stored!r}"
        yield TarError(message, at, TarFault.SLACK, name=name)
    padding = bytes(data[entry.content_end : min(entry.following, len(data))])
    if padding.count(0) != len(padding):
        offset = entry.following - len(padding.lstrip(b"\0"))
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
    """The few fields that matter; ``tarfile.TarInfo.frombuf`` parses all and takes five times as long."""
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
    """Octal digits, or base 256 behind a mark (GNU, for files of 8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not digits.isdigit() and digits:
        raise ValueError(f"no number: {field!r}")
    return int(digits or b"0", 8)


def _until_zero(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _check_kind(header: _Header, name: str, shard: str, at: int, following: int) -> None:
    if header.type in _REFUSED:
        message = f"{shard}: {name!r} at byte {at} is {_REFUSED[header.type]}; shards hold plain files only"
        raise TarError(message, at, TarFault.LINK, following, name)
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        message = f"{shard}: {name!r} at byte {at} has the unknown type {header.type!r}"
        raise TarError(message, at, following=following, name=name)


def _safe_name(name: str, shard: str, at: int, following: int) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        message = f"{shard}: the name at byte {at} is no UTF-8: {name!a}"
        raise TarError(message, at, TarFault.PATH, following) from error
    name = name.removeprefix("./")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        message = f"{shard}: the name {name!r} at byte {at} leaves the shard"
        raise TarError(message, at, TarFault.PATH, following, name)
    return name


def _pax_fields(payload: bytes, shard: str, at: int, following: int) -> dict[str, str]:
    """Records ``length key=value newline``; only ``path`` and ``size`` matter here."""
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


def _first_nonzero(data: memoryview, at: int) -> int | None:
    for start in range(at, len(data), 1 << 20):
        piece = bytes(data[start : start + (1 << 20)])
        if piece.count(0) != len(piece):
            return start + len(piece) - len(piece.lstrip(b"\0"))
    return None
