"""Write the files of a checkpoint with their checksums, and complete, remove or rename its folder.

The process that writes checkpoints imports this module, so it imports neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zlib_ng.zlib_ng import crc32

from data_pipeline.io.atomic import publish, sync

_CHUNK_BYTES = 16 << 20


class Written(NamedTuple):
    """A file that was written: its size and CRC-32."""

    bytes: int
    crc32: int


def write_file(path: Path, pieces: Iterable[memoryview]) -> Written:
    """Writes a new file piece by piece and syncs it.

    Raises:
        OSError: the disk is full, the file exists, or the like.
    """
    size = checksum = 0
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            for chunk in _chunks(piece):
                checksum = crc32(chunk, checksum)
                size += len(chunk)
                while chunk:  # A raw write may take only a part, on a disk that is about to be full.
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return Written(size, checksum)


def write_share(
    folder: Path, names: tuple[str, str], header: bytes, notes: dict[str, Any], values: Iterable[memoryview]
) -> list[Written]:
    """Writes what one rank gives to a checkpoint: a safetensors file and the notes about it.

    Args:
        folder: The checkpoint that is being written.
        names: Of the two files.
        header: First bytes of the safetensors file.
        notes: ``tensors`` says something about each tensor; its ``crc32`` is filled in.
        values: Bytes of the tensors, in that order.

    Raises:
        OSError: the disk is full, a file exists, or the like.
    """
    checksums: list[int] = []

    def stream() -> Iterable[memoryview]:
        yield memoryview(header)
        for value in values:
            checksums.append(checksum_of(value))
            yield value

    tensors = write_file(folder / names[0], stream())
    for entry, checksum in zip(notes["tensors"].values(), checksums, strict=True):
        entry["crc32"] = checksum
    text = json.dumps(notes, separators=(",", ":")).encode()
    return [tensors, write_file(folder / names[1], [memoryview(text)])]


def complete(partial: Path, final: Path, last: tuple[str, str], doomed: Iterable[Path]) -> None:
    """Write the last file of a folder, rename the folder, and remove folders that are no longer wanted.

    Args:
        partial: The folder, with every other file in it, synced.
        final: Its name once it is complete.
        last: Name and text of the last file.
        doomed: Folders to remove.

    Raises:
        OSError: the disk is full, or the like.
    """
    name, text = last
    write_file(partial / name, [memoryview(text.encode())])
    publish(partial, final)
    for path in doomed:
        remove_folder(path)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder ``NAME.partial`` that is renamed to ``final`` when the block ends; remove it if it raises.

    The files in it must be synced by the block.

    Raises:
        OSError: the disk is full, or the like.
    """
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder that looks whole. It is renamed first: one that is half removed must not look so.

    Raises:
        OSError: it cannot be removed.
    """
    leftover = path.with_name(path.name + ".partial")
    path.rename(leftover)
    shutil.rmtree(leftover)


def set_aside(path: Path, suffix: str) -> Path:
    """Renames a folder to the first free name of ``NAMEsuffix``, ``NAMEsuffix-2``, ``NAMEsuffix-3``, ...

    Returns:
        The new path. No earlier folder is replaced.

    Raises:
        OSError: it cannot be renamed.
    """
    number, new = 1, path.with_name(path.name + suffix)
    while os.path.lexists(new):
        number += 1
        new = path.with_name(f"{path.name}{suffix}-{number}")
    path.rename(new)
    sync(path.parent)
    return new


def checksum_of(value: memoryview) -> int:
    """CRC-32 of bytes in memory."""
    checksum = 0
    for chunk in _chunks(value):
        checksum = crc32(chunk, checksum)
    return checksum


def _chunks(value: memoryview) -> Iterable[memoryview]:
    return (value[start : start + _CHUNK_BYTES] for start in range(0, len(value), _CHUNK_BYTES))
