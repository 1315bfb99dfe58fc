"""Columns on disk: named numpy arrays plus one JSON record, mapped and never copied.

For: the sidecar index of a shard and the manifest of a data set. The file is a plain safetensors file, so any tool can
look inside, and reading it can run no code. Not for: tensors of a model.

    8 bytes: length of the header | header (JSON: dtype, shape, data_offsets) | columns

Files come from anywhere, so the reader trusts nothing: lengths and offsets are checked against the size of the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from data_pipeline.errors import ManifestError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import UntrustedError, open_regular, parse_json

Column = npt.NDArray[Any]

_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8"}
_MAX_HEADER_BYTES = 1 << 20
_CHECKED_AT_ONCE = 1 << 16
_RECORD = "record"  # One metadata key only: safetensors writes several in an unstated order.


@dataclass(frozen=True)
class Columns:
    """What a column file holds. ``arrays`` are read-only views of the mapped file, shared by all processes."""

    arrays: dict[str, Column]
    record: dict[str, Any]
    _map: mmap.mmap = field(repr=False)

    def release_pages(self) -> None:
        """Takes pages that were looked at out of this process's memory; they stay in the system's page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


def write_columns(path: Path, arrays: Mapping[str, Column], record: Mapping[str, Any]) -> None:
    """Writes ``path`` whole or not at all; equal input gives equal bytes."""
    metadata = {_RECORD: json.dumps(record, sort_keys=True, ensure_ascii=True)}
    write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def read_columns(
    path: Path,
    expected: Mapping[str, tuple[str, int]],
    format_name: str,
    shown: str = "",
    optional: Collection[str] = (),
) -> Columns:
    """Maps ``path`` and checks that it holds exactly the ``expected`` columns.

    Args:
        path: A file of ``write_columns``.
        expected: Column name to (numpy dtype, number of dimensions).
        format_name: Must equal the record's ``format``.
        shown: What messages call the file, if it is a copy of another.
        optional: Expected columns that files of earlier versions lack.

    Raises:
        ManifestError: the file is missing, truncated, of another format, or its header points outside of it.
    """
    shown = shown or str(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ManifestError(f"{shown}: {size} bytes: too short to be a {format_name}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except UntrustedError as error:
        raise ManifestError(f"{shown}: {error}") from error
    except OSError as error:
        raise ManifestError(f"{shown}: cannot be read: {error.strerror}") from error
    try:
        return _parse(data, size, expected, format_name, optional)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ManifestError(f"{shown}: damaged {format_name}: {error}") from error


def _parse(
    data: mmap.mmap, size: int, expected: Mapping[str, tuple[str, int]], format_name: str, optional: Collection[str]
) -> Columns:
    (header_bytes,) = struct.unpack_from("<Q", data, 0)
    start = 8 + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or start > size:
        raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
    header = parse_json(data[8:start])
    record = parse_json(header.pop("__metadata__")[_RECORD])
    if record["format"] != format_name:
        raise ValueError(f"format {record['format']!r}, expected {format_name!r}")
    if not set(expected) - set(optional) <= set(header) <= set(expected):
        raise ValueError(f"columns {sorted(header)}, expected {sorted(expected)}")
    arrays = {name: _column(data, start, size, name, header[name], *expected[name]) for name in header}
    return Columns(arrays, record, data)


def _column(
    data: mmap.mmap, start: int, size: int, name: str, entry: dict[str, Any], dtype: str, num_dims: int
) -> Column:
    kind = np.dtype(_DTYPES[entry["dtype"]])
    shape = tuple(int(side) for side in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if kind != np.dtype(dtype) or len(shape) != num_dims or min(shape, default=0) < 0:
        raise ValueError(f"column {name} is {kind} {shape}, expected {dtype} with {num_dims} dimensions")
    if not 0 <= begin <= end <= size - start or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"column {name} lies at bytes {begin}:{end} of {size - start}, shape {shape}")
    return np.frombuffer(data, kind, math.prod(shape), start + begin).reshape(shape)


def pack_strings(strings: Iterable[str]) -> tuple[Column, Column]:
    """UTF-8 bytes of all strings in one column and the N + 1 offsets between them."""
    encoded = [string.encode() for string in strings]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(piece) for piece in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def check_offsets(offsets: Column, total: int, what: str) -> None:
    """Checks prefix sums that a file claims.

    Raises:
        ManifestError: they do not rise from 0 to ``total``.
    """
    rises = len(offsets) > 0 and offsets[0] == 0 and int(offsets[-1]) == total
    for first in range(0, len(offsets) - 1, _CHECKED_AT_ONCE):  # In pieces: memory does not grow with the file.
        piece = offsets[first : first + _CHECKED_AT_ONCE + 1]
        rises = rises and bool(np.all(piece[1:] >= piece[:-1]))
    if not rises:
        raise ManifestError(f"{what}: offsets do not rise from 0 to {total}; rebuild it with: mmscale data index")
