"""Checksums and comparison of whole files; a FIFO or a device raises instead of blocking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from data_pipeline.io.untrusted import open_regular

_CHUNK_BYTES = 1 << 20


def holds(path: Path, data: bytes) -> bool:
    """Return whether a regular file has exactly this content.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return file.read(len(data) + 1) == data


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a regular file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sums_of(files: Mapping[str, Path]) -> str:
    """Return a line for each file, as ``sha256sum`` prints it, with the names that are the keys.

    Raises:
        OSError: a file cannot be read.
    """
    return "".join(f"{sha256_of(path)}  {name}\n" for name, path in files.items())


def differing_sums(built: str, recorded: str) -> list[str]:
    """Return the lines that only one of two texts of ``sums_of`` has, by file name, after ``built`` or ``recorded``."""
    ours, theirs = set(built.splitlines()), set(recorded.splitlines())
    lines = sorted(ours ^ theirs, key=lambda line: (line.partition("  ")[2], line in theirs))
    return [("built    " if line in ours else "recorded ") + line for line in lines]


def crc32_of(path: Path) -> int:
    """Return the CRC-32 of a regular file.

    Raises:
        OSError: it cannot be read.
    """
    checksum = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = crc32(chunk, checksum)
    return checksum
