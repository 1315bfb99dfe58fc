"""Thumbnails for HTML reports."""

from __future__ import annotations

import io

from PIL import Image

from data_pipeline.images.decode import DecodeMode, decode_image

_QUALITY = 85


def thumbnail(data: bytes, side: int, max_pixels: int = 1 << 26) -> bytes:
    """Return the image as a JPEG whose longer side is at most ``side`` pixels; smaller images keep their size.

    Raises:
        SampleError: the image cannot be decoded, or has more than ``max_pixels`` pixels.
    """
    pixels = decode_image(data, mode=DecodeMode.FAST, max_pixels=max_pixels, min_side=(side, side))
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
