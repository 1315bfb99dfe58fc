"""Reference implementation of Molmo's image preprocessing with numpy and torch: crops, masks, tokens, and their order.

It follows ``MultiModalPreprocessor.image_to_patches_and_tokens`` and ``build_image_input_idx`` of allenai/molmo,
olmo/data/model_preprocessor.py, crop mode "overlap-and-resize-c2". It uses the original steps, so that it is
independent of our code. An image is uint8 ``(height, width, 3)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2.functional import InterpolationMode
from torchvision.transforms.v2.functional import resize as torchvision_resize

Array = npt.NDArray[Any]
Resize = Callable[[Array, tuple[int, int]], Array]


@dataclass(frozen=True)
class Sizes:
    """Side of a crop and of a patch in pixels, margin in patches, and limit of crops; defaults are as published."""

    crop: int = 336
    patch: int = 14
    margin: int = 4
    most: int = 12
    pool: int = 2

    @property
    def side(self) -> int:
        """Features per side of a crop."""
        return self.crop // self.patch // self.pool

    @property
    def window(self) -> int:
        """Distance between the corners of neighbouring crops, in pixels."""
        return self.crop - 2 * self.margin * self.patch


@dataclass(frozen=True)
class Prepared:
    """The input of Molmo for one image.

    Attributes:
        crops: float32 ``(n, patches, values)`` from 0 to 1, the overview first; patch order (row, column, channel).
        tokens: Ids; see ``IDS``.
        index: ``(n, features)`` position in ``tokens`` of each feature; negative for dropped features.
        masks: ``(n, patches)`` share of image pixels, as the model receives it.
    """

    crops: Array
    tokens: Array
    index: Array
    masks: Array


START, END, PATCH, COLUMN = IDS = (1000, 1001, 1002, 1003)


def float_resize(image: Array, size: tuple[int, int]) -> Array:
    """Resize in floating point, as published ("torch-bilinear")."""
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    out = torchvision_resize(planes, list(size), InterpolationMode.BILINEAR, antialias=True)
    return out.clip(0, 1).permute(1, 2, 0).numpy()


def prepare(image: Array, sizes: Sizes, resize: Resize = float_resize) -> Prepared:
    margins = 2 * sizes.margin * sizes.patch
    rows, columns = tiling(image.shape[0] - margins, image.shape[1] - margins, sizes)
    canvas = (rows * sizes.window + margins, columns * sizes.window + margins)
    plane, mask = padded(image, canvas, resize)
    crops, masks, numbers = [], [], []
    on = 0
    for i in range(rows):
        for j in range(columns):
            top, left = i * sizes.window, j * sizes.window
            crops.append(patches(plane[top : top + sizes.crop, left : left + sizes.crop], sizes.patch))
            part = mask[top : top + sizes.crop, left : left + sizes.crop, None]
            masks.append(patches(part, sizes.patch).astype(np.float32).mean(-1))
            number, on = numbered(i, j, (rows, columns), sizes, on)
            numbers.append(number)
    overview, _ = padded(image, (sizes.crop, sizes.crop), resize)
    tokens = [
        *laid_out(sizes.side, sizes.side),
        *laid_out(canvas[0] // sizes.patch // 2, canvas[1] // sizes.patch // 2),
    ]
    # As in the original code: the overview is first, and its mask, all -1, is last.
    last = np.full((1, masks[0].size), -1, np.float32)
    return Prepared(
        np.stack([patches(overview, sizes.patch), *crops]),
        np.array(tokens),
        places(np.stack(numbers), (rows, columns), np.array(tokens), sizes),
        np.concatenate([np.stack(masks), last]),
    )


def tiling(height: int, width: int, sizes: Sizes) -> tuple[int, int]:
    """Return rows and columns of crops, for an image size without the margins."""
    both = range(1, sizes.most + 1)
    choices = sorted(((i, j) for i in both for j in both if i * j <= sizes.most), key=lambda c: (c[0] * c[1], c[0]))
    with np.errstate(divide="ignore"):
        scales = np.array(choices, np.int32) * sizes.window / np.array([height, width], np.float32)
    scales = scales.astype(np.float32).min(-1)
    best = scales.argmax() if (scales < 1).all() else np.where(scales < 1, np.float32(10e9), scales).argmin()
    return choices[best]


def padded(image: Array, size: tuple[int, int], resize: Resize) -> tuple[Array, Array]:
    """Return the image on a black background, and its mask."""
    one = np.float32
    scale = min(one(size[1]) / one(image.shape[1]), one(size[0]) / one(image.shape[0]))
    height, width = int(one(image.shape[0]) * scale), int(one(image.shape[1]) * scale)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    plane, mask = np.zeros((*size, 3), np.float32), np.zeros(size, bool)
    plane[top : top + height, left : left + width] = resize(image, (height, width))
    mask[top : top + height, left : left + width] = True
    return plane, mask


def patches(pixels: Array, patch: int) -> Array:
    rows, columns, channels = pixels.shape[0] // patch, pixels.shape[1] // patch, pixels.shape[2]
    squares = pixels.reshape(rows, patch, columns, patch, channels).transpose(0, 2, 1, 3, 4)
    return squares.reshape(rows * columns, -1)


def numbered(i: int, j: int, grid: tuple[int, int], sizes: Sizes, on: int) -> tuple[Array, int]:
    """Return the numbers, from ``on``, of the kept features of a crop; -1 for the others."""
    out = np.full((sizes.side, sizes.side), -1)
    kept = []
    for at, count in zip((i, j), grid, strict=True):
        length = sizes.crop // sizes.patch - 2 * sizes.margin
        length += sizes.margin * ((at == 0) + (at == count - 1))
        first = 0 if at == 0 else sizes.margin // sizes.pool
        kept.append(slice(first, first + length // sizes.pool))
    size = (kept[0].stop - kept[0].start) * (kept[1].stop - kept[1].start)
    out[kept[0], kept[1]] = np.arange(on, on + size).reshape(kept[0].stop - kept[0].start, -1)
    return out, on + size


def laid_out(rows: int, columns: int) -> list[int]:
    return [START, *([PATCH] * columns + [COLUMN]) * rows, END]


def places(numbers: Array, grid: tuple[int, int], tokens: Array, sizes: Sizes) -> Array:
    """Return the position in ``tokens`` of each feature."""
    side = sizes.side
    order, flat = numbers.reshape(-1).copy(), numbers.reshape(-1)
    across = numbers.reshape(*grid, side, side).transpose(0, 2, 1, 3).reshape(-1)
    order[flat >= 0] = across[across >= 0]  # The features of all crops in the order of the whole image.
    order = np.concatenate([np.arange(side**2), np.where(order >= 0, order + side**2, -1)])
    valid = order >= 0
    rank = np.zeros(valid.sum(), int)
    rank[order[valid]] = np.arange(valid.sum())
    out = np.full(order.shape, -100)
    out[valid] = np.nonzero(tokens == PATCH)[0][rank]
    return out.reshape(-1, side**2)
