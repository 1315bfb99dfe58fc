"""Read format, size and orientation of an encoded image from its header, without decoding pixels.

The indexer stores the size. The decoder uses it to reject decompression bombs before it allocates memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from enum import Enum
from typing import Literal, NamedTuple

from data_pipeline.errors import FaultKind, SampleError

Buffer = bytes | memoryview

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: C0-CF without DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_APP1 = 0xE1
# Markers followed by a length field: frames, tables (DHT, DAC, DQT, DRI), DNL, scans, applications, comments.
_WITH_LENGTH = _START_OF_FRAME | {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _START_OF_SCAN, *range(0xE0, 0xF0), 0xFE}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_FILL = 0xFF
_KNOWN_MARKERS = _WITH_LENGTH | _STANDALONE | {_FILL}
_FRAME = struct.Struct(">BHHB")
# Each block of 64 values needs a Huffman code for DC. A sequential frame needs one more code for the end of the block.
_LEAST_BITS_PER_BLOCK = {0xC0: 2, 0xC1: 2, 0xC2: 1}
# A scan of a progressive JPEG can be as short as 12 bytes and still makes the decoder process the whole image.
# Encoders write about ten scans.
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_MOST_SCANS = 100
_AFTER_PIXELS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_END_OF_IMAGE = 0xD9
_EXIF_PREFIX = b"Exif\0\0"
_WEBP_HAS_EXIF = 0x08  # A flag of the VP8X chunk.
_ORIENTATION = 0x0112  # The EXIF tag.
_EXIF_LONG = 4  # A 32-bit integer. The standard prescribes 16 bits for the orientation; some writers use 32.


class ImageFormat(str, Enum):
    """Image encodings that shards may contain."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"


FORMAT_OF_EXTENSION = {
    "jpg": ImageFormat.JPEG,
    "jpeg": ImageFormat.JPEG,
    "png": ImageFormat.PNG,
    "webp": ImageFormat.WEBP,
}
"""Expected format by the last part of a member's extension (``0.png`` -> ``png``)."""


class ImageSize(NamedTuple):
    """Format, size and orientation from an image header.

    Attributes:
        format: Encoding.
        width, height: Size in pixels after the EXIF rotation, as the decoder returns the image.
        orientation: EXIF orientation, 1 to 8. 1 means as stored; 5 to 8 swap width and height.
    """

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1


def is_image(ext: str) -> bool:
    """Return whether a member's extension is that of an image (``jpg``, ``0.png``)."""
    return ext.rpartition(".")[2] in FORMAT_OF_EXTENSION


def known_format(data: Buffer) -> ImageFormat | None:
    """Return the image format that the first bytes indicate; None if they are not JPEG, PNG or WebP."""
    start = bytes(data[:12])
    if start.startswith(_PNG_MAGIC):
        return ImageFormat.PNG
    if start.startswith(b"\xff\xd8"):
        return ImageFormat.JPEG
    return ImageFormat.WEBP if start[:4] == b"RIFF" and start[8:12] == b"WEBP" else None


def image_size(data: Buffer) -> ImageSize:
    """Return format, size and orientation of a JPEG, PNG or WebP.

    Raises:
        SampleError: the bytes are not a JPEG, PNG or WebP, the header is incomplete or damaged, or a side is 0. A JPEG
            also raises if it has an invalid marker, too many scans, or too few bytes for its size.
    """
    start = bytes(data[:32])
    found = known_format(data)
    if found is ImageFormat.PNG:
        width, height, exif = _png(start, data)
    elif found is ImageFormat.JPEG:
        width, height, exif = _jpeg(data)
    elif found is ImageFormat.WEBP:
        width, height, exif = _webp(start, data)
    else:
        raise SampleError(
            f"no JPEG, PNG or WebP: it starts with {start[:8].hex(' ') or 'nothing'}", kind=FaultKind.DECODE
        )
    orientation = exif_orientation(exif) if exif else 1
    if orientation >= 5:
        width, height = height, width
    if width < 1 or height < 1:
        raise SampleError(f"a {found.value} of {width}x{height} pixels", kind=FaultKind.DECODE)
    return ImageSize(found, width, height, orientation)


def png_chunks(data: Buffer) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, content offset, content length) of each PNG chunk. The last chunk may extend past the data."""
    at = len(_PNG_MAGIC)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield bytes(data[at + 4 : at + 8]), at + 8, length
        at += 12 + length


def _png(start: bytes, data: Buffer) -> tuple[int, int, bytes]:
    """Return width and height as stored, and the EXIF block (empty if absent)."""
    if len(start) < 29 or start[8:16] != b"\0\0\0\x0dIHDR":
        raise SampleError("a PNG without its header chunk", kind=FaultKind.DECODE)
    width, height = int.from_bytes(start[16:20], "big"), int.from_bytes(start[20:24], "big")
    exif = next((bytes(data[at : at + length]) for kind, at, length in png_chunks(data) if kind == b"eXIf"), b"")
    return width, height, exif


def _jpeg(data: Buffer) -> tuple[int, int, bytes]:
    """Return width and height as stored, and the EXIF block (empty if absent).

    Reads the segments up to the first scan in the same way as libjpeg.

    Raises:
        SampleError: an unknown marker, or bytes between segments. libjpeg would scan for the next marker there, and a
            decoder could find another frame than this function. A second frame and too many scans raise as well.
    """
    frame, exif, at = None, b"", 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker not in _KNOWN_MARKERS:
            found = bytes(data[at : at + 2]).hex(" ")
            raise SampleError(f"a JPEG with no marker at byte {at}: {found}", kind=FaultKind.DECODE)
        if marker == _FILL:  # Fill bytes may precede a marker.
            at += 1
            continue
        if marker in _STANDALONE:
            at += 2
            continue
        content, at = at + 4, at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker == _APP1 and not exif and bytes(data[content : content + len(_EXIF_PREFIX)]) == _EXIF_PREFIX:
            exif = bytes(data[content + len(_EXIF_PREFIX) : at])
        elif marker in _START_OF_FRAME and content + _FRAME.size <= len(data):
            if frame is not None:
                raise SampleError(f"a JPEG with a second frame at byte {content}", kind=FaultKind.DECODE)
            frame = (marker, *_FRAME.unpack_from(data, content)[1:], bytes(data[content + _FRAME.size : at]))
        elif marker == _START_OF_SCAN:
            if frame is not None and frame[0] in _PROGRESSIVE:
                _check_scans(data, at)
            break
    if frame is None:
        raise SampleError("a JPEG that ends before its size is known", kind=FaultKind.DECODE)
    marker, height, width, num_components, components = frame
    least = _least_jpeg_bytes(marker, height, width, components[: 3 * num_components])
    if len(data) < least:
        raise SampleError(
            f"a JPEG of {width}x{height} pixels in {len(data)} bytes: they take {least} bytes at least",
            kind=FaultKind.DECODE,
        )
    return width, height, exif


def _check_scans(data: Buffer, at: int) -> None:
    """Raise ``SampleError`` if a progressive JPEG has too many scans. ``at``: offset after the first scan's header."""
    num_scans = 1
    while (found := _AFTER_PIXELS.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            break
        num_scans += marker == _START_OF_SCAN
        at += int.from_bytes(data[at : at + 2], "big")
    if num_scans > _MOST_SCANS:
        raise SampleError(
            f"a progressive JPEG of {num_scans} scans, the limit is {_MOST_SCANS}: a decompression bomb",
            kind=FaultKind.DECODE,
        )


def _least_jpeg_bytes(marker: int, height: int, width: int, components: bytes) -> int:
    """Return a lower bound on the size of a JPEG with this frame; 0 for arithmetic coding, which has no such bound.

    The decoder fills a file that ends early with gray. Without this check, 828 bytes that claim 9000x9900 pixels take
    8 seconds to decode.
    """
    sampling = [(value >> 4, value & 15) for value in components[1::3]]
    most_x, most_y = (max((factor[i] for factor in sampling), default=0) for i in (0, 1))
    if not most_x or not most_y:
        return 0  # The decoder rejects this frame.
    blocks = sum(-(-width * x // (8 * most_x)) * -(-height * y // (8 * most_y)) for x, y in sampling)
    return blocks * _LEAST_BITS_PER_BLOCK.get(marker, 0) // 8


def exif_orientation(exif: bytes) -> int:
    """Return the first orientation (1 to 8) in the first directory of a TIFF block; 1 if it has no valid one."""
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
            value = number(at + 8, 4 if number(at + 2, 2) == _EXIF_LONG else 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _webp(start: bytes, data: Buffer) -> tuple[int, int, bytes]:
    """Return width and height as stored, and the EXIF block (empty if absent)."""
    if len(start) < 30:
        raise SampleError("a WebP that ends before its size is known", kind=FaultKind.DECODE)
    kind, exif = start[12:16], b""
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(start[i : i + 3], "little") for i in (24, 27))
        if start[20] & _WEBP_HAS_EXIF:
            exif = _webp_exif(data)
    elif kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(start[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    else:
        raise SampleError(f"a WebP whose first chunk {kind!r} holds no size", kind=FaultKind.DECODE)
    return width, height, exif


def _webp_exif(data: Buffer) -> bytes:
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if bytes(data[at : at + 4]) == b"EXIF":
            return bytes(data[at + 8 : at + 8 + length]).removeprefix(_EXIF_PREFIX)
        at += 8 + length + length % 2
    return b""
