"""Thumbnails for HTML reports."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_pipeline.images.decode import DecodeMode, Pixels, decode_image
from data_pipeline.images.stored_frames import open_video
from data_pipeline.sample import MediaPart, VideoPart

_QUALITY = 85


def thumbnail(data: bytes, side: int, max_pixels: int = 1 << 26) -> bytes:
    """Return the image as a JPEG whose longer side is at most ``side`` pixels; smaller images keep their size.

    Raises:
        SampleError: the image cannot be decoded, or has more than ``max_pixels`` pixels.
    """
    return _jpeg(decode_image(data, mode=DecodeMode.FAST, max_pixels=max_pixels, min_side=(side, side)), side)


def thumbnails(part: MediaPart, side: int, num_frames: int = 4) -> list[bytes]:
    """Return the thumbnail of an image, those of evenly spread frames of a video, or none for a sound.

    Args:
        part: The medium.
        side: As in ``thumbnail``.
        num_frames: Largest number of frames, at least 1.

    Raises:
        SampleError: it cannot be decoded.
    """
    if isinstance(part, VideoPart):
        with open_video(part.data) as file:
            numbers = {int(i) for i in np.linspace(0, file.num_frames - 1, num_frames).round()}
            return [_jpeg(pixels, side) for _, pixels in file.decode(sorted(numbers))]
    return [thumbnail(part.data, side)] if part.kind == "image" else []


def _jpeg(pixels: Pixels, side: int) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
