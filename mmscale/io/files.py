"""Write the files of a checkpoint with their checksums, and publish, remove or rename its folder.

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
from data_pipeline.io.retry import retry_io

_CHUNK_BYTES = 16 << 20


class WrittenFile(NamedTuple):
    """Size and CRC-32 of a file that was written."""

    bytes: int
    crc32: int


def write_file(path: Path, pieces: Iterable[memoryview]) -> WrittenFile:
    """Write a new file piece by piece, and sync it.

    Raises:
        OSError: the file already exists, or cannot be written.
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
    return WrittenFile(size, checksum)


def write_share(
    folder: Path, names: tuple[str, str], header: bytes, metadata: dict[str, Any], values: Iterable[memoryview]
) -> list[WrittenFile]:
    """Write the two files of one rank, and sync them: a safetensors file and its metadata.

    Args:
        folder: The checkpoint that is being written.
        names: Names of the two files.
        header: Header of the safetensors file, with its length.
        metadata: Metadata as JSON values, mutated: sets ``crc32`` of each entry of ``tensors``.
        values: Bytes of the tensors, in the order of ``metadata["tensors"]``.

    Returns:
        Size and checksum of the safetensors file and of the metadata file.

    Raises:
        OSError: a file already exists, or cannot be written.
    """
    checksums: list[int] = []

    def stream() -> Iterable[memoryview]:
        yield memoryview(header)
        for value in values:
            checksums.append(checksum_of(value))
            yield value

    tensors = write_file(folder / names[0], stream())
    for entry, checksum in zip(metadata["tensors"].values(), checksums, strict=True):
        entry["crc32"] = checksum
    text = json.dumps(metadata, separators=(",", ":")).encode()
    return [tensors, write_file(folder / names[1], [memoryview(text)])]


def finalize(
    partial: Path, final: Path, last: tuple[str, str], stale: Iterable[Path], best: Path | None = None
) -> None:
    """Write the last file of a folder, rename the folder, point the link of the best one, then remove stale folders.

    Wait for a file system that is lost, see ``data_pipeline.io.retry``.

    Args:
        partial: The folder. All its other files are written and synced.
        final: New path of the folder.
        last: Name and text of the last file.
        stale: Folders to remove.
        best: Folder that the link ``best`` points to; None leaves the link as it is.

    Raises:
        OSError: a folder or file cannot be written, renamed or removed. ``final`` may be complete if only the removal
            failed.
    """
    name, text = last
    retry_io(lambda: write_file(partial / name, [memoryview(text.encode())]), lambda: remove_files(partial, [name]))

    def rename() -> None:
        if partial.exists():
            publish(partial, final)
        else:  # An earlier attempt has renamed it.
            sync(final.parent)

    retry_io(rename)
    if best is not None:
        link_best(final.parent, best)
    for path in stale:
        remove_folder(path)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files that a failed attempt may have written. Raises OSError if one cannot be removed."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


BEST_LINK = "best"
"""Name of the link to the best checkpoint, in the folder of the checkpoints."""


def link_best(folder: Path, best: Path | None) -> None:
    """Point the link ``best`` in ``folder`` to the folder ``best`` next to it, atomically; None removes the link.

    Nothing reads the link but users: a file system without links, or a folder of that name, leaves it as it is.
    """
    link = folder / BEST_LINK
    if os.path.lexists(link) and not link.is_symlink():
        return
    with contextlib.suppress(OSError):
        if best is None:
            link.unlink(missing_ok=True)
            return
        new = folder / f".{BEST_LINK}.partial"
        new.unlink(missing_ok=True)
        new.symlink_to(best.name, target_is_directory=True)
        os.replace(new, link)
        sync(folder)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder ``NAME.partial``, and rename it to ``final`` when the block ends; remove it if it raises.

    The block must sync the files that it writes.

    Raises:
        OSError: the folder cannot be made or renamed.
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
    """Remove a folder. Rename it to ``NAME.partial`` first, so an interrupted removal leaves no incomplete ``NAME``.

    Raises:
        OSError: the folder cannot be renamed or removed.
    """
    leftover = path.with_name(path.name + ".partial")

    def remove() -> None:
        if path.exists() or not leftover.exists():
            path.rename(leftover)
        shutil.rmtree(leftover)

    retry_io(remove)


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a folder to the first free name of ``NAMEsuffix``, ``NAMEsuffix-2``, ``NAMEsuffix-3``, ...

    Returns:
        The new path. An existing folder is never replaced.

    Raises:
        OSError: the folder cannot be renamed.
    """
    number, new = 1, path.with_name(path.name + suffix)
    while os.path.lexists(new):
        number += 1
        new = path.with_name(f"{path.name}{suffix}-{number}")
    path.rename(new)
    sync(path.parent)
    return new


def checksum_of(value: memoryview) -> int:
    """Return the CRC-32 of bytes in memory."""
    checksum = 0
    for chunk in _chunks(value):
        checksum = crc32(chunk, checksum)
    return checksum


def _chunks(value: memoryview) -> Iterable[memoryview]:
    return (value[start : start + _CHUNK_BYTES] for start in range(0, len(value), _CHUNK_BYTES))
