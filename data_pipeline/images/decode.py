"""Encoded image to RGB pixels.

Two named modes, never mixed silently. ``exact`` decodes every pixel: byte for byte what Pillow and torchvision give.
``fast`` lets the JPEG decoder leave out work when a smaller image is wanted, about 45 dB from ``exact`` after resizing.
PNG and WebP decode alike in both, and both take the same files. Not for: resizing (``crops``).

torchvision is imported with the first image that needs it: it brings the compiler of torch along, which is a third of
what a command has to load that only reads a configuration.
"""

from __future__ import annotations

import threading
from enum import Enum

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.image_header import ImageFormat, ImageSize, image_size, png_chunks

Pixels = npt.NDArray[np.uint8]
"""uint8 ``(height, width, 3)``, RGB."""


class DecodeMode(str, Enum):
    """How JPEGs are decoded."""

    EXACT = "exact"
    """Every pixel."""
    FAST = "fast"
    """JPEGs at 1/8, 2/8, 3/8 or 4/8 of their size: the smallest of these that is not below the wanted one, if any."""


_PNG_GRAY, _PNG_RGB, _PNG_PALETTE = 0, 2, 3  # Colour types in a PNG's header.
# libjpeg's warnings about bytes that no pixel depends on. Any other one means damaged pixels or gray in their place.
_HARMLESS = (
    "extraneous bytes before marker",
    "unknown JFIF revision number",
    "Unknown Adobe color transform code",
    "Invalid SOS parameters for sequential JPEG",
    "Inconsistent progression sequence",
    "bad ICC marker",
)
_MOST_KEPT_BYTES = 1 << 25


class Scratch(threading.local):
    """Memory that pixels are decoded into, image after image, by each thread into its own.

    It is still in the processor's cache when the next image comes; fresh memory never is. Of images that take more than
    32 MiB nothing is kept.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8] | None:
        """At least so many bytes, valid until the next call; None if memory is better not kept."""
        if num_bytes > _MOST_KEPT_BYTES:
            return None
        if num_bytes > len(self._memory):
            self._memory = np.empty(num_bytes, dtype=np.uint8)
        return self._memory


def decode_image(
    data: bytes,
    *,
    mode: DecodeMode = DecodeMode.EXACT,
    max_pixels: int,
    min_side: tuple[int, int] | None = None,
    header: ImageSize | None = None,
    scratch: Scratch | None = None,
) -> Pixels:
    """Decodes JPEG, PNG or WebP bytes.

    Args:
        data: The encoded image.
        mode: ``fast`` may return a smaller image than stored, never below ``min_side``.
        max_pixels: Refuse larger images by their header, before memory is spent on them.
        min_side: Height and width that the caller will resize to; None decodes at full size.
        header: What ``image_size`` said of the data, if the caller asked it already.
        scratch: Where the pixels may lie until the next image is decoded; None for memory of their own.

    Returns:
        uint8 ``(height, width, 3)``. Transparent pixels are blended with white, gray is repeated, of 16 bits the upper
        8 are kept, and the EXIF orientation is applied.

    Raises:
        SampleError: unknown format, damaged data, or more than ``max_pixels`` pixels.
    """
    size = image_size(data) if header is None else header
    if size.width * size.height > max_pixels:
        raise too_many_pixels(size.width, size.height, max_pixels)
    try:
        if size.format is ImageFormat.JPEG:
            # libjpeg-turbo has no vector code for 5/8 to 7/8: they take longer than the whole image.
            half = min_side is not None and min_side[0] * 2 <= size.height + 1 and min_side[1] * 2 <= size.width + 1
            wanted = min_side if mode is DecodeMode.FAST and half and size.orientation == 1 else None
            memory = scratch.take(3 * size.width * size.height) if scratch is not None else None
            pixels = _decode_jpeg(data, size, wanted, memory)
        elif size.format is ImageFormat.PNG:
            pixels = _decode_png(data)
        else:
            pixels = _torchvision(data, size.format, "UNCHANGED")
    except (RuntimeError, ValueError) as error:  # What libjpeg, libpng and libwebp become in Python.
        raise SampleError(
            f"a damaged {size.format.value} image: {_first_line(error)}", kind=FaultKind.DECODE
        ) from error
    pixels = _flatten(pixels)
    return pixels if size.orientation == 1 else _turned(pixels, size.orientation)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def too_many_pixels(width: int, height: int, max_pixels: int) -> SampleError:
    """The refusal of an image by its header."""
    return SampleError(
        f"an image of {width}x{height} pixels, the limit is {max_pixels} pixels: a decompression bomb, "
        "or raise max_image_pixels",
        kind=FaultKind.DECODE,
    )


def _decode_jpeg(
    data: bytes, size: ImageSize, min_side: tuple[int, int] | None, memory: npt.NDArray[np.uint8] | None
) -> Pixels:
    """Pixels as stored.

    Raises:
        ValueError: the data are damaged, or the decoder finds another frame than ``image_size``: checked before any
            memory is spent on pixels.
    """
    stored = (size.height, size.width) if size.orientation < 5 else (size.width, size.height)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if not _is_harmless(error):
            raise
        height, width, colorspace, _ = _header_with_warnings(data)
    if (height, width) != stored:
        raise ValueError(f"its header says {stored[1]}x{stored[0]} pixels, the decoder would give {width}x{height}")
    height, width = min_side or (0, 0)
    try:
        if colorspace in ("CMYK", "YCCK"):
            return _from_print_colors(simplejpeg.decode_jpeg(data, colorspace="CMYK"))
        return simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            fastdct=False,
            fastupsample=False,
            min_height=height,
            min_width=width,
            buffer=memory,
        )
    except ValueError as error:
        if not _is_harmless(error):
            raise
    return _torchvision(data, size.format, "RGB")  # It passes over warnings, but not over a missing end.


def _header_with_warnings(data: bytes) -> tuple[int, int, str, str]:
    """Height, width, colours and subsampling of a JPEG whose header libjpeg warns about."""
    try:
        return simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError as error:  # What simplejpeg makes of a header that libjpeg gave up.
        raise ValueError("no header that libjpeg can read") from error


def _is_harmless(error: ValueError) -> bool:
    return any(warning in str(error) for warning in _HARMLESS)


def _from_print_colors(inks: Pixels) -> Pixels:
    """Stored CMYK, where 255 is no ink, to RGB by Pillow's rounding."""
    black = inks[..., 3:].astype(np.uint32)
    product = (255 - inks[..., :3]) * black + 128
    return (black - ((product >> 8) + product >> 8)).clip(0, 255).astype(np.uint8)


def _decode_png(data: bytes) -> Pixels:
    """uint8 or uint16 ``(H, W, 1..4)`` as stored, with alpha where the file has it in any form.

    torchvision ignores a colour key, and of a palette without transparency its alpha is memory that nobody wrote.
    """
    bits, kind = data[24], data[25]
    chunks = {name: data[at : at + length] for name, at, length in png_chunks(data) if name in (b"PLTE", b"tRNS")}
    transparency = chunks.get(b"tRNS")
    if kind == _PNG_PALETTE:
        if not transparency:
            return _torchvision(data, ImageFormat.PNG, "RGB")
        return _palette_with_alpha(data, bits, chunks.get(b"PLTE", b""), transparency)
    pixels = _torchvision(data, ImageFormat.PNG, "UNCHANGED")
    num_channels = {_PNG_GRAY: 1, _PNG_RGB: 3}.get(kind, 0)
    if not transparency or not num_channels or len(transparency) != 2 * num_channels:
        return pixels
    key = np.frombuffer(transparency, ">u2") & ((1 << bits) - 1)
    if bits < 8:
        key = key * (255 // ((1 << bits) - 1))  # As libpng widens fewer bits.
    opaque = (pixels != key).any(axis=2, keepdims=True) * np.iinfo(pixels.dtype).max
    return np.concatenate([pixels, opaque.astype(pixels.dtype)], axis=2)


def _palette_with_alpha(data: bytes, bits: int, palette: bytes, alpha: bytes) -> Pixels:
    """Decodes with a palette that maps each number to itself, and looks the colours up here."""
    table = np.zeros((256, 4), dtype=np.uint8)
    colors = np.frombuffer(palette[: min(len(palette) // 3 * 3, 3 * 256)], np.uint8).reshape(-1, 3)
    table[: len(colors), :3] = colors
    table[:, 3] = 255
    table[: len(alpha), 3] = np.frombuffer(alpha[:256], np.uint8)
    numbers = bytes(number for number in range(1 << min(bits, 8)) for _ in range(3))
    plain = [data[:33], _png_chunk(b"PLTE", numbers)]
    plain += [data[at - 8 : at + length + 4] for name, at, length in png_chunks(data) if name in (b"IDAT", b"IEND")]
    return table[_torchvision(b"".join(plain), ImageFormat.PNG, "RGB")[..., 0]]


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + crc32(name + content).to_bytes(4, "big")


def _torchvision(data: bytes, kind: ImageFormat, mode: str) -> Pixels:
    """``(H, W, C)`` as stored; ``mode`` names one of torchvision's ``ImageReadMode``."""
    from torchvision import io

    decode = {ImageFormat.JPEG: io.decode_jpeg, ImageFormat.PNG: io.decode_png, ImageFormat.WEBP: io.decode_webp}[kind]
    encoded = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())  # Copied: torch warns of read-only memory.
    return decode(encoded, io.ImageReadMode[mode]).permute(1, 2, 0).numpy()


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels as shown."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _flatten(pixels: Pixels) -> Pixels:
    """uint8 or uint16 ``(H, W, 1..4)`` to uint8 ``(H, W, 3)`` on white."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    channels = pixels.shape[2]
    if channels in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        color = pixels[..., :-1].astype(np.uint16)
        # (x + 127) // 255 rounds; the sum is exact in 16 bits: 255 * 255 + 127 < 65536.
        pixels = ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)
