"""A perceptual hash: 64 bits that hardly change when an image is scaled, compressed again or made a little brighter.

    pixels --gray, Lanczos--> 32 x 32 --DCT-II--> 8 x 8 lowest frequencies --each above their median?--> 64 bits

Source: N. Krawetz, "Looks Like It", The Hacker Factor Blog, 2011 (pHash, its DCT variant). The bits equal those of
``phash`` of the ImageHash package. Not for: crops, rotations or mirror images. An image of nearly one colour has no
structure to compare and gets no hash.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.images.decode import Pixels

_SIDE, _LOW = 32, 8
_MIN_RANGE = 8
"""Smallest difference, in levels of 256, between the darkest and the lightest of the 32 x 32 points."""
_DECIMALS = 3
"""Round coefficients: an exact 0 becomes about 1e-10 in float64, with a random sign that would decide the bit."""

# Row k of the matrix is the k-th cosine of the DCT-II. Its scale is omitted: it does not change the comparisons.
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))


def perceptual_hash(pixels: Pixels) -> int | None:
    """Return the hash of an image, or None for an image of nearly one colour. The highest bit is the mean's.

    Args:
        pixels: uint8 ``(height, width, 3)``, RGB.
    """
    gray = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    points = np.asarray(gray, np.float64)
    if points.max() - points.min() < _MIN_RANGE:
        return None
    low: npt.NDArray[np.float64] = np.round(_COSINES @ points @ _COSINES.T, _DECIMALS)
    bits = np.packbits(low.ravel() > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")
