"""The member of a sample that holds an image as token ids: a safetensors file that names its tokenizer.

    jpg  --image tokenizer, offline-->  jpg.tokens: tensor ``codes`` (height, width), metadata ``tokenizer`` (SHA-256)

The file has the safetensors layout, so other tools can read it, and reading one cannot run code. It names its tokenizer
because resharding and joining move samples between manifests.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.untrusted import UntrustedError, parse_json
from data_pipeline.shards.image_header import is_image

_SUFFIX = ".tokens"
_DTYPES = {"U16": "<u2", "U32": "<u4"}
_MAX_HEADER_BYTES = 1 << 12
_MAX_SIDE = 1 << 16


class TokenGrid(NamedTuple):
    """An image as token ids.

    Attributes:
        codes: Non-negative integers ``(height, width)``: entries of the tokenizer's codebook.
        tokenizer: SHA-256 of the image tokenizer, hexadecimal.
    """

    codes: npt.NDArray[np.int32]
    tokenizer: str


def grid_extension(image: str) -> str:
    """Return the extension of the member with the token ids of the image member ``image`` (``0.png``)."""
    return image + _SUFFIX


def is_grid(ext: str) -> bool:
    """Return whether a member's extension is that of an image as token ids (``jpg.tokens``)."""
    return ext.endswith(_SUFFIX) and is_image(ext.removesuffix(_SUFFIX))


def with_encoded_images(members: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Return the members, and an empty image for each token grid whose image is no member.

    A sample that holds only the token ids of its images is then read like any other.
    """
    images = [ext.removesuffix(_SUFFIX) for ext in members if is_grid(ext)]
    return {**dict.fromkeys(images, b""), **members} if images else members


def encode_grid(codes: npt.NDArray[np.integer[Any]], codebook_size: int, tokenizer: str) -> bytes:
    """Return the content of a member. Equal arguments give equal bytes.

    Args:
        codes: Integers ``(height, width)`` from 0 to below ``codebook_size``.
        codebook_size: Number of entries of the codebook. Determines whether a code takes two or four bytes.
        tokenizer: SHA-256 of the tokenizer, hexadecimal.

    Raises:
        ValueError: ``codes`` has no two dimensions, an empty side, or a code outside the codebook.
    """
    if codes.ndim != 2 or not codes.size or codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(f"codes of shape {codes.shape}: expected (height, width) and values below {codebook_size}")
    dtype = np.uint16 if codebook_size <= 1 << 16 else np.uint32
    return save({"codes": np.ascontiguousarray(codes, dtype)}, {"tokenizer": tokenizer})


def decode_grid(data: bytes, name: str) -> TokenGrid:
    """Return the token ids of a member.

    Args:
        data: Content of the member, which may come from an untrusted source.
        name: Its extension, for messages.

    Raises:
        SampleError: the member is damaged.
    """
    try:
        (header_bytes,) = struct.unpack_from("<Q", data, 0)
        start = 8 + header_bytes
        if header_bytes > _MAX_HEADER_BYTES or start > len(data):
            raise ValueError(f"a header of {header_bytes} bytes in a member of {len(data)}")
        header = parse_json(data[8:start])
        entry, tokenizer = header["codes"], header["__metadata__"]["tokenizer"]
        height, width = entry["shape"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        sides_fit = all(type(side) is int and 0 < side <= _MAX_SIDE for side in (height, width))
        if not sides_fit or not isinstance(tokenizer, str) or height * width * dtype.itemsize != len(data) - start:
            raise ValueError(f"codes of shape {entry['shape']} in {len(data) - start} bytes")
        codes = np.frombuffer(data, dtype, height * width, start).reshape(height, width)
        if codes.max() > np.iinfo(np.int32).max:
            raise ValueError(f"a code of {codes.max()}")
    except (struct.error, UntrustedError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SampleError(f".{name}: damaged token grid: {error}", kind=FaultKind.DECODE) from error
    return TokenGrid(codes.astype(np.int32), tokenizer)
