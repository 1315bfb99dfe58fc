"""Checksums and comparison of whole files; a FIFO or a device raises instead of blocking."""

from __future__ import annotations

import hashlib
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
