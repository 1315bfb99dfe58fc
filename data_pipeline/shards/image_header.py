"""Format and size of an encoded image, read from its header without decoding a pixel.

For: indexing a shard, and refusing a decompression bomb before memory is spent on it. Not for: decoding.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import Literal, NamedTuple

from data_pipeline.errors import FaultKind, SampleError

Buffer = bytes | memoryview

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: C0-CF without DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TWO_SIDES = struct.Struct(">HH")
_APP1 = 0xE1
_ORIENTATION = 0x0112  # The EXIF tag.
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
    """What the header says.

    Attributes:
        format: Encoding.
        width, height: Pixels of the image as it is shown and decoded: a rotation that EXIF asks for is applied.
        orientation: EXIF orientation, 1 to 8; 1 is as stored, 5 to 8 exchange width and height.
    """

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1


def is_image(ext: str) -> bool:
    """Whether a member's extension names an image (``jpg``, ``0.png``)."""
    return ext.rpartition(".")[2] in FORMAT_OF_EXTENSION


def known_format(data: Buffer) -> ImageFormat | None:
    """What the first bytes say it is; None if it is no JPEG, PNG or WebP."""
    start = bytes(data[:12])
    if start.startswith(_PNG_MAGIC):
        return ImageFormat.PNG
    if start.startswith(b"\xff\xd8"):
        return ImageFormat.JPEG
    return ImageFormat.WEBP if start[:4] == b"RIFF" and start[8:12] == b"WEBP" else None


def image_size(data: Buffer) -> ImageSize:
    """Format, width and height of a JPEG, PNG or WebP.

    Raises:
        SampleError: the bytes are none of these, or end before the size is known, or a side is 0.
    """
    start = bytes(data[:32])
    found = known_format(data)
    if found is ImageFormat.PNG:
        size = _png(start, data)
    elif found is ImageFormat.JPEG:
        size = _jpeg(data)
    elif found is ImageFormat.WEBP:
        size = _webp(start)
    else:
        raise SampleError(
            f"no JPEG, PNG or WebP: it starts with {start[:8].hex(' ') or 'nothing'}", kind=FaultKind.DECODE
        )
    if size.width < 1 or size.height < 1:
        raise SampleError(f"a {size.format.value} of {size.width}x{size.height} pixels", kind=FaultKind.DECODE)
    return size


def _shown(kind: ImageFormat, width: int, height: int, exif: bytes) -> ImageSize:
    orientation = exif_orientation(exif) if exif else 1
    if orientation >= 5:
        width, height = height, width
    return ImageSize(kind, width, height, orientation)


def _png(start: bytes, data: Buffer) -> ImageSize:
    if len(start) < 24 or start[12:16] != b"IHDR":
        raise SampleError("a PNG without its header chunk", kind=FaultKind.DECODE)
    width, height = int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
    at, exif = 8, b""
    while at + 8 <= len(data):  # Chunks before the pixels: the decoder looks at no others.
        kind, length = bytes(data[at + 4 : at + 8]), int.from_bytes(data[at : at + 4], "big")
        if kind == b"eXIf":
            exif = bytes(data[at + 8 : at + 8 + length])
        if kind in (b"eXIf", b"IDAT"):
            break
        at += 12 + length
    return _shown(ImageFormat.PNG, width, height, exif)


def _jpeg(data: Buffer) -> ImageSize:
    at, exif = 2, None
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise SampleError(f"a JPEG with no marker at byte {at}", kind=FaultKind.DECODE)
        marker = data[at + 1]
        if marker == 0xFF:  # Fill bytes may precede a marker.
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in _START_OF_FRAME and at + 9 <= len(data):
            height, width = _TWO_SIDES.unpack_from(data, at + 5)
            return _shown(ImageFormat.JPEG, width, height, exif or b"")
        else:
            length = max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
            if marker == _APP1 and exif is None:
                exif = bytes(data[at + 4 + len(b"Exif\0\0") : at + 2 + length])
            at += 2 + length
    raise SampleError("a JPEG that ends before its size is known", kind=FaultKind.DECODE)


def exif_orientation(exif: bytes) -> int:
    """Orientation, 1 to 8, of a TIFF block; 1 if it says nothing that makes sense.

    Reads what the decoder reads (torchvision ``exif.h``): the first directory, up to its first orientation entry. Of a
    JPEG the block is the first APP1 segment less six bytes, whatever they are.
    """
    order: Literal["big", "little"] = "big" if exif[:2] == b"MM" else "little"

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order) if at + size <= len(exif) else -1

    if number(2, 2) != 0x2A:
        return 1
    first = number(4, 4)
    for entry in range(max(0, number(first, 2)) if first >= 0 else 0):
        at = first + 2 + 12 * entry
        tag = number(at, 2)
        if tag in (-1, 0xFFFF):
            break
        if tag == _ORIENTATION:
            value = number(at + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


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
