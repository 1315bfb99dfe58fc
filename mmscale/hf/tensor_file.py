"""Write and read the header of a safetensors file.

header length (8 bytes) | header (JSON) | values of tensor 0 | of tensor 1 | ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.io.untrusted import open_regular, parse_json

_MOST_HEADER_BYTES = 100_000_000
"""Limit of the format."""

FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str] | None = None
) -> bytes:
    """Return the header of a safetensors file with these (name, dtype, shape), stored without gaps in this order."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for key, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class HeaderEntry(NamedTuple):
    """Header entry of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte in the file."""
    stop: int
    """Offset after the last byte."""


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Return the header entries of a safetensors file by tensor name. Reads no values.

    The byte ranges are not checked against the size of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is damaged or too large.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path.name}: no safetensors file: its header would have {length} bytes")
        text = file.read(length)
    try:
        listed = {key: entry for key, entry in parse_json(text).items() if key != "__metadata__"}
        return {
            key: HeaderEntry(
                str(entry["dtype"]),
                tuple(int(size) for size in entry["shape"]),
                *(8 + length + int(offset) for offset in entry["data_offsets"]),
            )
            for key, entry in listed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: the safetensors header is damaged: {error!r}") from error
