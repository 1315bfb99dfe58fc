"""Column files: named numpy arrays and one JSON record, memory-mapped instead of read.

Shard indexes and manifests are column files. The format is safetensors, so other tools can read them, and reading one
cannot run code.

    8 bytes: length of the header | header (JSON: dtype, shape, data_offsets) | columns

The files may come from an untrusted source, so all lengths and offsets are checked against the file size.
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
from data_pipeline.io.retry import retry_io
from data_pipeline.io.untrusted import UntrustedError, open_regular, parse_json

Column = npt.NDArray[Any]

_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8"}
_MAX_HEADER_BYTES = 1 << 20
_CHUNK_ROWS = 1 << 16
_RECORD = "record"  # A single metadata key, because safetensors writes several in an unspecified order.


@dataclass(frozen=True)
class Columns:
    """The content of a column file. ``arrays`` are read-only views of the mapped file, shared by all processes."""

    arrays: dict[str, Column]
    record: dict[str, Any]
    _map: mmap.mmap = field(repr=False)

    def release_pages(self) -> None:
        """Unload accessed pages from this process's memory; they stay in the system's page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


def write_columns(path: Path, arrays: Mapping[str, Column], record: Mapping[str, Any]) -> None:
    """Write ``path`` atomically. Equal arguments give byte-identical files."""
    metadata = {_RECORD: json.dumps(record, sort_keys=True, ensure_ascii=True)}
    write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))


def read_columns(
    path: Path,
    expected: Mapping[str, tuple[str, int]],
    format_name: str,
    display_name: str = "",
    optional: Collection[str] = (),
) -> Columns:
    """Map ``path`` and check that it has exactly the ``expected`` columns. Wait for a file system that is lost.

    Args:
        path: A file written by ``write_columns``.
        expected: Column name to (numpy dtype, number of dimensions).
        format_name: Must equal the record's ``format``.
        display_name: The file's name in messages, if it is a local copy.
        optional: Expected columns that files of earlier versions may lack.

    Raises:
        ManifestError: the file is missing, truncated or of another format, or its header points outside the file.
    """
    display_name = display_name or str(path)

    def mapped() -> mmap.mmap:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ManifestError(f"{display_name}: {size} bytes: too short to be a {format_name}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    try:
        data = retry_io(mapped)
    except UntrustedError as error:
        raise ManifestError(f"{display_name}: {error}") from error
    except OSError as error:
        raise ManifestError(f"{display_name}: cannot be read: {error.strerror}") from error
    try:
        return _parse(data, len(data), expected, format_name, optional)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ManifestError(f"{display_name}: damaged {format_name}: {error}") from error


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
        raise ValueError(f"column {name} of shape {shape} is at bytes {begin}:{end} of {size - start}")
    return np.frombuffer(data, kind, math.prod(shape), start + begin).reshape(shape)


def pack_strings(strings: Iterable[str]) -> tuple[Column, Column]:
    """Return the UTF-8 bytes of all N strings in one column, and the N + 1 offsets of their boundaries."""
    encoded = [string.encode() for string in strings]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(string) for string in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def check_offsets(offsets: Column, total: int, what: str) -> None:
    """Check prefix sums from a file.

    Raises:
        ManifestError: they do not start at 0, decrease, or do not end at ``total``.
    """
    rises = len(offsets) > 0 and offsets[0] == 0 and int(offsets[-1]) == total
    for first in range(0, len(offsets) - 1, _CHUNK_ROWS):  # In chunks, so that memory use is bounded.
        chunk = offsets[first : first + _CHUNK_ROWS + 1]
        rises = rises and bool(np.all(chunk[1:] >= chunk[:-1]))
    if not rises:
        raise ManifestError(f"{what}: offsets do not rise from 0 to {total}; rebuild it with: mmscale data index")
