"""Walks the headers of a tar and says exactly where it is damaged.

For: building an index and verifying a shard. Python's ``tarfile`` takes a damaged header for the end of the archive and
stops without a word, so a half-lost shard would pass; this walk raises instead. Not for: extracting files.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
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
# webdataset's rule: the key ends at the first dot of the base name.
_KEY_AND_EXT = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class TarError(ShardError):
    """A damaged or hostile tar.

    Args:
        message: What was seen; names file and offset.
        offset: Byte of the header at fault.
    """

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True)
class TarMember:
    """A regular file inside a tar; offsets in bytes from the start of the tar."""

    name: str
    header_offset: int
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension in lower case) of a member's name; None if it has no extension.

    ``a/000.0.PNG`` -> ``("a/000", "0.png")``, as webdataset does.
    """
    match = _KEY_AND_EXT.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def walk(data: memoryview, shard: str) -> Iterator[TarMember]:
    """Regular files of a tar in order; folders are passed over.

    Args:
        data: The whole tar, usually mapped.
        shard: Its name, for messages.

    Raises:
        ShardError: the tar is truncated, a header is damaged, a member is a link, a device or sparse, or a name
            would leave the folder. Names file and offset.
    """
    at, long_name, pax = 0, "", dict[str, str]()
    while True:
        if at + BLOCK_BYTES > len(data):
            raise TarError(f"{shard}: truncated: ends at byte {len(data)} without an end mark (header due at {at})", at)
        block = bytes(data[at : at + BLOCK_BYTES])
        if block == _ZEROS:
            return _check_tail(data, at, shard)
        header = _header(block, shard, at)
        name = pax.get("path") or long_name or header.name
        size = int(pax.get("size", header.size))
        start = at + BLOCK_BYTES
        if size < 0 or start + size > len(data):
            raise TarError(
                f"{shard}: truncated: {name!r} at byte {at} claims {size} bytes, {len(data) - start} are left",
                at,
            )
        following = start + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if header.type in (_GNU_LONG_NAME, _PAX, _PAX_GLOBAL):
            if size > _MAX_NAME_BYTES:
                raise TarError(f"{shard}: a name or attribute block of {size} bytes at byte {at}", at)
            payload = bytes(data[start : start + size])
            if header.type == _GNU_LONG_NAME:
                long_name = payload.rstrip(b"\0").decode(errors="surrogateescape")
            elif header.type == _PAX:
                pax = _pax_fields(payload, shard, at)
        else:
            _check_kind(header, name, shard, at)
            if not header.is_folder:
                yield TarMember(_safe_name(name, shard, at), at, start, size)
            long_name, pax = "", {}
        at = following


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
        raise TarError(f"{shard}: bad header at byte {at}: {error}", at) from error
    # The checksum counts its own field as spaces.
    if stored != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise TarError(f"{shard}: bad header at byte {at}: bad checksum", at)
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


def _check_kind(header: _Header, name: str, shard: str, at: int) -> None:
    if header.type in _REFUSED:
        raise TarError(f"{shard}: {name!r} at byte {at} is {_REFUSED[header.type]}; shards hold plain files only", at)
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise TarError(f"{shard}: {name!r} at byte {at} has the unknown type {header.type!r}", at)


def _safe_name(name: str, shard: str, at: int) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise TarError(f"{shard}: the name at byte {at} is no UTF-8: {name!a}", at) from error
    name = name.removeprefix("./")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise TarError(f"{shard}: the name {name!r} at byte {at} leaves the shard", at)
    return name


def _pax_fields(payload: bytes, shard: str, at: int) -> dict[str, str]:
    """Records ``length key=value newline``; only ``path`` and ``size`` matter here."""
    fields: dict[str, str] = {}
    while payload:
        digits, _, _ = payload.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        record, payload = payload[len(digits) + 1 : length - 1], payload[length:] if length else b""
        key, found, value = record.partition(b"=")
        if not found or (key == b"size" and not (value.isdigit() and len(value) < 20)):
            raise TarError(f"{shard}: damaged attributes at byte {at}", at)
        if key.startswith(b"GNU.sparse"):
            raise TarError(f"{shard}: a sparse file at byte {at}; shards hold plain files only", at)
        fields[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
    return fields


def _check_tail(data: memoryview, at: int, shard: str) -> None:
    """After the end mark only zeros may follow: anything else is lost data behind a damaged header."""
    for start in range(at, len(data), 1 << 20):
        tail = bytes(data[start : start + (1 << 20)])
        if tail.count(0) != len(tail):
            raise TarError(f"{shard}: data behind the end mark at byte {at}: the tar was damaged or joined", at)
