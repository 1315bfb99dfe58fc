"""Count how many images are copies of others, in bounded memory and without reading an image.

Images count as equal if their crc32 and size in bytes, both from the index, are equal. The count is exact for up to
``LIMIT`` different images. With more, only images whose hash ends in n zero bits are counted, with all their copies,
and the result is scaled up. n grows by one, which halves the counted images, whenever their number exceeds the limit.

Source: P. Gibbons, "Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries and Event Reports", VLDB
2001. Not for: saying which samples are duplicates (``dedup``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LIMIT = 1 << 22
_PENDING = 1 << 20


class CopyCount:
    """Counts copies among images. ``limit`` is the largest number of different images held (16 bytes each)."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._level = 0
        self._keys = np.zeros(0, np.uint64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[npt.NDArray[np.uint64]] = []
        self._num_pending = 0
        self._num_images = 0

    def add(self, keys: npt.NDArray[np.uint64]) -> None:
        """Count images, given their ``image_keys``."""
        self._num_images += len(keys)
        kept = keys[self._is_held(keys)]
        self._pending.append(kept)
        self._num_pending += len(kept)
        if self._num_pending >= max(_PENDING, len(self._keys) // 2):
            self._settle()

    def _is_held(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return keys & np.uint64((1 << self._level) - 1) == 0

    def _settle(self) -> None:
        keys = np.concatenate([self._keys, *self._pending])
        counts = np.concatenate([self._counts, np.ones(self._num_pending, np.int64)])
        self._pending, self._num_pending = [], 0
        self._keys, inverse = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(inverse, weights=counts, minlength=len(self._keys)).astype(np.int64)
        while len(self._keys) > self._limit:
            self._level += 1
            held = self._is_held(self._keys)
            self._keys, self._counts = self._keys[held], self._counts[held]

    def summary(self) -> dict[str, Any]:
        """Return the number of images that equal an earlier one, their share, and the share's 95 % error."""
        self._settle()
        images, copies = self._counts, self._counts - 1
        share = float(copies.sum() / images.sum()) if len(images) else 0.0
        error = 0.0
        if self._level and len(images):  # Error of a ratio of two sums: Cochran, Sampling Techniques, 6.3.
            error = 1.96 * float(np.sqrt(((copies - share * images) ** 2).sum()) / images.sum())
        num_copies = int(copies.sum()) if not self._level else round(share * self._num_images)
        return {"images": num_copies, "share": round(share, 6), "error_95": round(error, 6), "by": "crc32 and size"}


def image_keys(crc32: npt.NDArray[np.uint32], size: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return a well-mixed 64-bit hash of each image's crc32 and size (the finaliser of SplitMix64)."""
    x = crc32.astype(np.uint64) << np.uint64(32) | (size.astype(np.uint64) & np.uint64(0xFFFFFFFF))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
