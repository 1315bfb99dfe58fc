"""Encoded image to RGB pixels.

Two named modes, never mixed silently. ``exact`` decodes every pixel: byte for byte what Pillow and torchvision give.
``fast`` lets the JPEG decoder leave out work when a smaller image is wanted, about 45 dB from ``exact`` after resizing.
PNG and WebP decode alike in both, and both take the same files. Not for: resizing (``views``).

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

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.image_header import ImageFormat, ImageSize, image_size

Pixels = npt.NDArray[np.uint8]
"""uint8 ``(height, width, 3)``, RGB."""


class DecodeMode(str, Enum):
    """How JPEGs are decoded."""

    EXACT = "exact"
    """Every pixel."""
    FAST = "fast"
    """JPEGs at 1/8, 2/8, 3/8 or 4/8 of their size: the smallest of these that is not below the wanted one, if any."""


_PNG_PALETTE = 3  # The colour type in a PNG's header.
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
        uint8 ``(height, width, 3)``. Transparency is flattened on white, gray is repeated, EXIF rotation is applied.

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
            wanted = min_side if mode is DecodeMode.FAST and half else None
            memory = scratch.take(3 * size.width * size.height) if scratch is not None else None
            pixels = _upright_jpeg(data, wanted, memory) if size.orientation == 1 else None
            if pixels is not None:
                return pixels
        tensor = _decode_exactly(data, size.format)
    except (RuntimeError, ValueError) as error:  # What libjpeg, libpng and libwebp become in Python.
        raise SampleError(
            f"a damaged {size.format.value} image: {_first_line(error)}", kind=FaultKind.DECODE
        ) from error
    return _flatten(tensor)


def _decode_exactly(data: bytes, kind: ImageFormat) -> torch.Tensor:
    """uint8 or uint16 ``(1..4, H, W)``, upright."""
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png, decode_webp

    if kind is ImageFormat.JPEG:
        return decode_jpeg(_bytes_tensor(data), ImageReadMode.RGB, apply_exif_orientation=True)
    if kind is ImageFormat.PNG:
        return decode_png(_bytes_tensor(data), ImageReadMode[_png_mode(data)], apply_exif_orientation=True)
    return decode_webp(_bytes_tensor(data), ImageReadMode.UNCHANGED)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def too_many_pixels(width: int, height: int, max_pixels: int) -> SampleError:
    """The refusal of an image by its header."""
    return SampleError(
        f"an image of {width}x{height} pixels, the limit is {max_pixels} pixels: a decompression bomb, "
        "or raise max_image_pixels",
        kind=FaultKind.DECODE,
    )


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())  # Copied: torch warns of read-only memory.


def _png_mode(data: bytes) -> str:
    """UNCHANGED keeps what alpha there is; of a palette it would give the indices.

    RGB_ALPHA of a palette without transparency (tRNS) holds garbage for alpha (torchvision 0.28). A colour key, tRNS
    without a palette, is ignored: its pixels keep their colour.
    """
    if len(data) < 26 or data[25] != _PNG_PALETTE:
        return "UNCHANGED"
    return "RGB_ALPHA" if b"tRNS" in data[: data.find(b"IDAT")] else "RGB"


def _upright_jpeg(data: bytes, min_side: tuple[int, int] | None, memory: npt.NDArray[np.uint8] | None) -> Pixels | None:
    """The quickest way for nearly all JPEGs; None for those that torchvision must judge.

    simplejpeg knows no EXIF rotation and converts CMYK otherwise than Pillow. It refuses whatever libjpeg merely warns
    of, a few stray bytes before a marker, say, which photographs of the web have and every other reader accepts.
    """
    height, width = min_side or (0, 0)
    try:
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            fastdct=False,
            fastupsample=False,
            min_height=height,
            min_width=width,
            buffer=memory,
        )
    except ValueError:
        return None


def _flatten(tensor: torch.Tensor) -> Pixels:
    """uint8 or uint16 ``(1..4, H, W)`` to uint8 ``(H, W, 3)`` on white."""
    pixels = tensor.permute(1, 2, 0).numpy()
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
