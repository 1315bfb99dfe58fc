"""The member of a sample that holds an image or a video as token ids: a safetensors file that names its tokenizer.

    jpg  --image tokenizer, offline-->  jpg.tokens: tensor ``codes`` (height, width), metadata ``tokenizer`` (SHA-256)
    mp4  --image tokenizer, offline-->  mp4.tokens: tensor ``codes`` (time, height, width), metadata ``tokenizer``,
                                        ``seconds`` and ``frames_per_second``

The file has the safetensors layout, so other tools can read it, and reading one cannot run code. It names its tokenizer
because resharding and joining move samples between manifests. The grid of a video that is stored as images has the name
of its first frame.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.io.untrusted import UntrustedError, parse_json
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.video_file import is_video

_SUFFIX = ".tokens"
_DTYPES = {"U16": "<u2", "U32": "<u4"}
_MAX_HEADER_BYTES = 1 << 12
_MAX_SIDE = 1 << 16


class GridTimes(NamedTuple):
    """The times of a video as token ids.

    Attributes:
        seconds: Duration of the video.
        frames_per_second: Mean rate of the frames that were encoded, above 0; not of the codes, each of which may stand
            for several frames.
    """

    seconds: float
    frames_per_second: float


class TokenGrid(NamedTuple):
    """An image or a video as token ids.

    Attributes:
        codes: Non-negative integers: entries of the tokenizer's codebook. Of an image ``(height, width)``, of a video
            ``(time, height, width)``.
        tokenizer: SHA-256 of the image tokenizer, hexadecimal.
        times: Of a video; None for an image.
    """

    codes: npt.NDArray[np.int32]
    tokenizer: str
    times: GridTimes | None = None


def grid_extension(medium: str) -> str:
    """Return the extension of the member with the token ids of the image or video member ``medium`` (``0.png``)."""
    return medium + _SUFFIX


def is_grid(ext: str) -> bool:
    """Return whether a member's extension is that of an image or video as token ids (``jpg.tokens``)."""
    medium = ext.removesuffix(_SUFFIX)
    return medium != ext and (is_image(medium) or is_video(medium))


def with_encoded_media(members: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Return the members, and an empty image or video for each token grid whose image or video is no member.

    A sample that holds only the token ids of its media is then read like any other.
    """
    media = [ext.removesuffix(_SUFFIX) for ext in members if is_grid(ext)]
    return {**dict.fromkeys(media, b""), **members} if media else members


def encode_grid(
    codes: npt.NDArray[np.integer[Any]], codebook_size: int, tokenizer: str, times: GridTimes | None = None
) -> bytes:
    """Return the content of a member. Equal arguments give equal bytes.

    Args:
        codes: Integers from 0 to below ``codebook_size``: ``(height, width)`` of an image, ``(time, height, width)`` of
            a video.
        codebook_size: Number of entries of the codebook. Determines whether a code takes two or four bytes.
        tokenizer: SHA-256 of the tokenizer, hexadecimal.
        times: The times of a video; None for an image.

    Raises:
        ValueError: ``codes`` has another number of dimensions, an empty side, or a code outside the codebook.
    """
    sides = ("height", "width") if times is None else ("time", "height", "width")
    if codes.ndim != len(sides) or not codes.size or codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(
            f"codes of shape {codes.shape}: expected ({', '.join(sides)}) and values below {codebook_size}"
        )
    dtype = "U16" if codebook_size <= 1 << 16 else "U32"
    content = np.ascontiguousarray(codes, _DTYPES[dtype]).tobytes()
    metadata = {"tokenizer": tokenizer}
    metadata |= {} if times is None else {name: repr(float(value)) for name, value in times._asdict().items()}
    entry = {"dtype": dtype, "shape": codes.shape, "data_offsets": (0, len(content))}
    # The package safetensors writes several metadata in a random order.
    header = json.dumps({"__metadata__": metadata, "codes": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content


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
        entry, metadata = header["codes"], header["__metadata__"]
        tokenizer, shape = metadata["tokenizer"], tuple(entry["shape"])
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        sides_fit = len(shape) in (2, 3) and all(type(side) is int and 0 < side <= _MAX_SIDE for side in shape)
        if not sides_fit or not isinstance(tokenizer, str) or math.prod(shape) * dtype.itemsize != len(data) - start:
            raise ValueError(f"codes of shape {entry['shape']} in {len(data) - start} bytes")
        times = None
        if len(shape) == 3:
            times = GridTimes(*(float(metadata[name]) for name in GridTimes._fields))
            if not (0 <= times.seconds < math.inf and 0 < times.frames_per_second < math.inf):
                raise ValueError(f"a video of {times.seconds} s with {times.frames_per_second} frames a second")
        codes = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
        if codes.max() > np.iinfo(np.int32).max:
            raise ValueError(f"a code of {codes.max()}")
    except (struct.error, UntrustedError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise SampleError(f".{name}: damaged token grid: {error}", kind=FaultKind.DECODE) from error
    return TokenGrid(codes.astype(np.int32), tokenizer, times)
