"""Bytes that are on the disk when a call returns, with their checksum.

Tensors are streamed one by one in the safetensors format (an 8-byte length, a JSON header, the data): no second copy of
a rank's share is made, neither on the device nor on the host.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from mmscale.checkpoint.manifest import FileEntry

_FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 << 20


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> FileEntry:
    """Writes a new safetensors file and syncs it.

    Raises:
        OSError: the disk is full, the file exists, or the like.
    """
    named = list(tensors)
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in named:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _FORMAT_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(path, _stream(text, named))


def _stream(header: bytes, named: list[tuple[str, Tensor]]) -> Iterable[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for _, tensor in named:
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            yield flat.numpy().data


def write_bytes(path: Path, pieces: Iterable[memoryview]) -> FileEntry:
    """Writes a new file piece by piece and syncs it; its size and CRC-32.

    Raises:
        OSError: the disk is full, the file exists, or the like.
    """
    size = checksum = 0
    with path.open("xb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK_BYTES):
                chunk = piece[start : start + _CHUNK_BYTES]
                checksum = crc32(chunk, checksum)
                size += len(chunk)
                while chunk:  # A raw write may take only a part, on a disk that is about to be full.
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return FileEntry(bytes=size, crc32=checksum)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def crc32_of(path: Path) -> int:
    """CRC-32 of a file.

    Raises:
        OSError: it cannot be read.
    """
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = crc32(chunk, checksum)
    return checksum
