"""The safetensors format, as far as writing it goes.

header length (8 bytes) | header (JSON) | values of tensor 0 | of tensor 1 | ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

import torch

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
    """First bytes of a safetensors file whose tensors, by name, number format and shape, follow one another."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for key, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
