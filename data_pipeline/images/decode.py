"""Decode an encoded image to RGB pixels.

The configuration selects one of two modes. ``exact`` decodes every pixel, byte-identical to Pillow and torchvision.
``fast`` lets the JPEG decoder return a smaller image if the caller needs one; after resizing, the PSNR to ``exact`` is
about 45 dB. PNG and WebP are decoded in the same way in both modes, and both modes accept the same files.

torchvision is imported by the first image that needs it. It imports torch's compiler, which is a third of the import
time of a command that only reads a configuration.
"""

from __future__ import annotations

import io
import threading
from enum import Enum

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import PngImagePlugin
from zlib_ng.zlib_ng import crc32

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.image_header import ImageFormat, ImageSize, image_size, png_chunks

Pixels = npt.NDArray[np.uint8]
"""uint8 ``(height, width, 3)``, RGB."""


class DecodeMode(str, Enum):
    """Decoding of JPEGs."""

    EXACT = "exact"
    """Decode every pixel."""
    FAST = "fast"
    """Decode at 1/8, 2/8, 3/8 or 4/8 of the size, at the smallest of these that is large enough; else every pixel. A
    JPEG with an EXIF rotation or in CMYK is always decoded at full size."""


_PNG_GRAY, _PNG_RGB, _PNG_PALETTE = 0, 2, 3  # Colour types in a PNG's header.
# libjpeg's warnings about bytes that affect no pixel. Any other warning means damaged or missing pixels.
_HARMLESS = (
    "extraneous bytes before marker",
    "unknown JFIF revision number",
    "Unknown Adobe color transform code",
    "Invalid SOS parameters for sequential JPEG",
    "Inconsistent progression sequence",
    "bad ICC marker",
)
_MAX_SCRATCH_BYTES = 1 << 25


class Scratch(threading.local):
    """A reusable decode buffer for each thread.

    Unlike new memory, a reused buffer is still in the processor's cache. Images whose pixels take over 32 MiB do not
    use it.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def buffer(self, num_bytes: int) -> npt.NDArray[np.uint8] | None:
        """Return this thread's buffer of at least ``num_bytes``; None if that is too large to keep.

        The next call in the same thread invalidates its content.
        """
        if num_bytes > _MAX_SCRATCH_BYTES:
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
    """Decode JPEG, PNG or WebP bytes.

    Args:
        data: The encoded image.
        mode: ``fast`` may return an image smaller than stored, but at least ``min_side``.
        max_pixels: Images with more pixels raise, based on their header, before memory is allocated for them.
        min_side: (height, width) that the caller will resize to; None decodes at full size.
        header: The result of ``image_size(data)``, if the caller has it.
        scratch: Buffer for the pixels of a JPEG, which are then valid only until the thread decodes the next image.
            None allocates memory.

    Returns:
        uint8 ``(height, width, 3)``. Transparent pixels are blended with white, gray is repeated to three channels, 16
        bits are reduced to their upper 8, and the EXIF orientation is applied.

    Raises:
        SampleError: the format is unknown, the data are damaged, or the image has more than ``max_pixels`` pixels.
    """
    size = image_size(data) if header is None else header
    if size.width * size.height > max_pixels:
        raise too_many_pixels(size.width, size.height, max_pixels)
    try:
        if size.format is ImageFormat.JPEG:
            # libjpeg-turbo has no SIMD code for 5/8 to 7/8, so these sizes are slower than a full decode.
            half = min_side is not None and min_side[0] * 2 <= size.height + 1 and min_side[1] * 2 <= size.width + 1
            wanted = min_side if mode is DecodeMode.FAST and half and size.orientation == 1 else None
            memory = scratch.buffer(3 * size.width * size.height) if scratch is not None else None
            pixels = _decode_jpeg(data, size, wanted, memory)
        elif size.format is ImageFormat.PNG:
            pixels = _decode_png(data)
        else:
            pixels = _torchvision(data, size.format, "UNCHANGED")
    except (RuntimeError, ValueError, OSError, SyntaxError) as error:  # Errors of libjpeg, libwebp and Pillow.
        raise SampleError(
            f"a damaged {size.format.value} image: {_first_line(error)}", kind=FaultKind.DECODE
        ) from error
    pixels = _to_rgb(pixels)
    return pixels if size.orientation == 1 else _apply_orientation(pixels, size.orientation)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def too_many_pixels(width: int, height: int, max_pixels: int) -> SampleError:
    """Return the error for an image whose header claims too many pixels."""
    return SampleError(
        f"an image of {width}x{height} pixels, the limit is {max_pixels} pixels: a decompression bomb; "
        "if it is not, raise max_image_pixels",
        kind=FaultKind.DECODE,
    )


def _decode_jpeg(
    data: bytes, size: ImageSize, min_side: tuple[int, int] | None, memory: npt.NDArray[np.uint8] | None
) -> Pixels:
    """Decode a JPEG without applying its orientation.

    Raises:
        ValueError: the data are damaged, or the decoder finds another size than ``image_size``. The size is checked
            before memory is allocated for the pixels.
    """
    stored = (size.height, size.width) if size.orientation < 5 else (size.width, size.height)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if not _is_harmless(error):
            raise
        height, width, colorspace, _ = _header_with_warnings(data)
    if (height, width) != stored:
        raise ValueError(f"its header says {stored[1]}x{stored[0]} pixels, the decoder finds {width}x{height}")
    height, width = min_side or (0, 0)
    try:
        if colorspace in ("CMYK", "YCCK"):
            return _cmyk_to_rgb(simplejpeg.decode_jpeg(data, colorspace="CMYK"))
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
    return _torchvision(data, size.format, "RGB")  # torchvision ignores warnings, but raises if the end is missing.


def _header_with_warnings(data: bytes) -> tuple[int, int, str, str]:
    """Return height, width, colour space and subsampling of a JPEG whose header makes libjpeg warn."""
    try:
        return simplejpeg.decode_jpeg_header(data, strict=False)
    except KeyError as error:  # simplejpeg raises this if libjpeg cannot parse the header.
        raise ValueError("libjpeg cannot read its header") from error


def _is_harmless(error: ValueError) -> bool:
    return any(warning in str(error) for warning in _HARMLESS)


def _cmyk_to_rgb(inks: Pixels) -> Pixels:
    """Convert stored CMYK, where 255 means no ink, to RGB with Pillow's rounding."""
    black = inks[..., 3:].astype(np.uint32)
    product = (255 - inks[..., :3]) * black + 128
    return (black - ((product >> 8) + product >> 8)).clip(0, 255).astype(np.uint8)


def _decode_png(data: bytes) -> Pixels:
    """Decode a PNG to uint8 or uint16 ``(H, W, 1..4)``, with an alpha channel if the file has any transparency.

    Pillow decodes it, because torchvision 0.29 crashes the process on a damaged PNG. This function checks the checksums
    of the pixels, because Pillow does not, and leaves out metadata, because Pillow raises if they exceed 1 MiB.

    Raises:
        OSError, SyntaxError, ValueError: the data are damaged.
    """
    image_data, transparency, name = [data[:8]], b"", b""
    for name, at, length in png_chunks(data):
        if name[0] & 32 and name != b"tRNS":  # A lower-case first letter: the decoder does not need the chunk.
            continue
        if crc32(data[at - 4 : at + length]) != int.from_bytes(data[at + length : at + length + 4], "big"):
            raise ValueError(f"the checksum of its chunk {name!r} is wrong: the file is cut or changed, get it again")
        image_data.append(data[at - 8 : at + length + 4])
        if name == b"tRNS":
            transparency = data[at : at + length]
        if name == b"IEND":
            break
    if name != b"IEND":
        raise ValueError("its end is missing")
    bits, kind = data[24], data[25]
    # Not Image.open: it has a limit of pixels of its own.
    with PngImagePlugin.PngImageFile(io.BytesIO(b"".join(image_data))) as image:
        if image.size != (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")):
            raise ValueError(f"a second header says {image.width}x{image.height} pixels")
        if kind == _PNG_PALETTE:
            return np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))
        pixels = np.array(image.convert("L") if image.mode == "1" else image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None].astype(np.uint16 if bits == 16 else np.uint8)
    num_channels = {_PNG_GRAY: 1, _PNG_RGB: 3}.get(kind, 0)
    if not num_channels or len(transparency) != 2 * num_channels:
        return pixels
    key = np.frombuffer(transparency, ">u2") & ((1 << bits) - 1)
    if bits < 8:
        key = key * (255 // ((1 << bits) - 1))  # As Pillow expands fewer than 8 bits.
    elif pixels.dtype == np.uint8:
        key = key >> (bits - 8)  # Pillow keeps the upper byte of 16-bit colours; the key is compared with that byte.
    opaque = (pixels != key).any(axis=2, keepdims=True) * np.iinfo(pixels.dtype).max
    return np.concatenate([pixels, opaque.astype(pixels.dtype)], axis=2)


def _torchvision(data: bytes, kind: ImageFormat, mode: str) -> Pixels:
    """Decode with torchvision to ``(H, W, C)``. ``mode`` is the name of an ``ImageReadMode``."""
    from torchvision import io as torch_io

    decode = {ImageFormat.JPEG: torch_io.decode_jpeg, ImageFormat.WEBP: torch_io.decode_webp}[kind]
    # Copied because torch warns about read-only memory.
    encoded = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return decode(encoded, torch_io.ImageReadMode[mode]).permute(1, 2, 0).numpy()


def _apply_orientation(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate and flip the pixels by an EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(pixels: Pixels) -> Pixels:
    """Convert uint8 or uint16 ``(H, W, 1..4)`` to uint8 ``(H, W, 3)``, blended with white."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    channels = pixels.shape[2]
    if channels in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        color = pixels[..., :-1].astype(np.uint16)
        # (x + 127) // 255 rounds to nearest. The sum does not overflow 16 bits: 255 * 255 + 127 < 65536.
        pixels = ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)
