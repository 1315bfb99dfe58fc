"""Format and size of an encoded image, read from its header without decoding a pixel.

For: indexing a shard, and refusing a decompression bomb before memory is spent on it. Not for: decoding.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from data_pipeline.errors import FaultKind, SampleError

Buffer = bytes | memoryview

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: C0-CF without DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


class ImageFormat(str, Enum):
    """Encodings that shards may hold."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"


FORMAT_OF_EXTENSION = {
    "jpg": ImageFormat.JPEG,
    "jpeg": ImageFormat.JPEG,
    "png": ImageFormat.PNG,
    "webp": ImageFormat.WEBP,
}
"""Last part of a member's extension (``0.png`` -> ``png``) to what the bytes must be."""


class ImageSize(NamedTuple):
    """What the header says; width and height in pixels, before any EXIF rotation."""

    format: ImageFormat
    width: int
    height: int


def is_image(ext: str) -> bool:
    """Whether a member's extension names an image (``jpg``, ``0.png``)."""
    return ext.rpartition(".")[2] in FORMAT_OF_EXTENSION


def image_size(data: Buffer) -> ImageSize:
    """Format, width and height of a JPEG, PNG or WebP.

    Raises:
        SampleError: the bytes are none of these, or end before the size is known, or a side is 0.
    """
    start = bytes(data[:32])
    if start.startswith(_PNG_MAGIC):
        size = _png(start)
    elif start.startswith(b"\xff\xd8"):
        size = _jpeg(data)
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        size = _webp(start)
    else:
        raise SampleError(
            f"no JPEG, PNG or WebP: it starts with {start[:8].hex(' ') or 'nothing'}", kind=FaultKind.DECODE
        )
    if size.width < 1 or size.height < 1:
        raise SampleError(f"a {size.format.value} of {size.width}x{size.height} pixels", kind=FaultKind.DECODE)
    return size


def _png(start: bytes) -> ImageSize:
    if len(start) < 24 or start[12:16] != b"IHDR":
        raise SampleError("a PNG without its header chunk", kind=FaultKind.DECODE)
    return ImageSize(ImageFormat.PNG, int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big"))


def _jpeg(data: Buffer) -> ImageSize:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise SampleError(f"a JPEG with no marker at byte {at}", kind=FaultKind.DECODE)
        marker = data[at + 1]
        if marker == 0xFF:  # Fill bytes may precede a marker.
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in _START_OF_FRAME and at + 9 <= len(data):
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return ImageSize(ImageFormat.JPEG, width, height)
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    raise SampleError("a JPEG that ends before its size is known", kind=FaultKind.DECODE)


def _webp(start: bytes) -> ImageSize:
    if len(start) < 30:
        raise SampleError("a WebP that ends before its size is known", kind=FaultKind.DECODE)
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(start[i : i + 3], "little") for i in (24, 27))
    elif kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(start[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    else:
        raise SampleError(f"a WebP whose first chunk {kind!r} holds no size", kind=FaultKind.DECODE)
    return ImageSize(ImageFormat.WEBP, width, height)
