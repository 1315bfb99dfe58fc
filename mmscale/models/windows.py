"""Attention within windows of a frame: its settings, and the row order in which every window is consecutive.

    frame of 5 x 3 patches, side 2           rows of the blocks
    a a b                                    a a a a | b b | c c c c | d d | e e | f
    a a b
    c c d
    c c d
    e e f

Source: Qwen2.5-VL (arXiv 2502.13923), section 2.1.1, and ``get_vision_window_index`` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.batch import Segments
from data_pipeline.io.strict import StrictConfig
from data_pipeline.media_spec import Grid
from mmscale.nn.sizes import ShrunkTo, Side


class WindowsConfig(StrictConfig):
    """Attention within square windows of each frame, and within the whole frame in some blocks."""

    side: Annotated[Side, ShrunkTo(4)] = 8
    """Patches on a side of a window, counted from the top left corner of the frame (Qwen2.5-VL: 8, which are 112
    pixels). Windows at the right and the bottom are smaller if the frame is no multiple of it."""
    frame_layers: tuple[Annotated[int, Field(ge=0, le=1 << 12)], ...] = ()
    """0-based blocks in which a patch attends its whole frame, ascending (Qwen2.5-VL: 7, 15, 23, 31)."""

    def check(self, num_layers: int) -> None:
        """Raise ``ValueError`` if the blocks do not fit a tower of ``num_layers`` blocks."""
        layers = self.frame_layers
        if list(layers) != sorted({*layers}) or any(not 0 <= layer < num_layers for layer in layers):
            raise ValueError(
                f"windows.frame_layers={list(layers)}: must be ascending; blocks are numbered 0..{num_layers - 1}"
            )
        if len(layers) == num_layers:
            raise ValueError("windows.frame_layers: names every block, so no block has windows; leave windows out")


@dataclass(frozen=True)
class WindowRows:
    """The rows of a batch, window after window; all on the host. Windows are row-major, frame after frame.

    Attributes:
        order: int64 ``(P,)`` the packed patch that each row shows.
        restore: int64 ``(P,)`` the row of each packed patch.
        windows: Partition of the P rows into windows. A frame remains consecutive.
    """

    order: npt.NDArray[np.int64]
    restore: npt.NDArray[np.int64]
    windows: Segments

    @classmethod
    def from_grids(cls, grids: Sequence[Grid], side: int) -> WindowRows:
        """Return the rows of items with these grids of patches."""
        pieces, lengths, first = [np.empty(0, np.int64)], list[int](), 0
        for time, height, width in grids:
            within, counts = _frame(height, width, side)
            starts = first + np.arange(time) * (height * width)
            pieces.append((starts[:, None] + within).reshape(-1))
            lengths += counts * time
            first += time * height * width
        order = np.concatenate(pieces)
        restore = np.empty_like(order)
        restore[order] = np.arange(len(order))
        return cls(order, restore, Segments.from_lengths(lengths))


@lru_cache(maxsize=1024)
def _frame(height: int, width: int, side: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Return the patches of a frame, window by window, and the number of patches of each window."""
    rows, columns = np.divmod(np.arange(height * width), width)
    window = rows // side * -(-width // side) + columns // side
    return np.argsort(window, kind="stable"), np.bincount(window).tolist()
