"""At which size an image is seen whole: the published rules of towers that take any size, as pure functions.

Not for: tilings (``tilings``), pixels (``crops``).
"""

from __future__ import annotations

import math

Size = tuple[int, int]
"""Height and width, pixels."""


def area_size(height: int, width: int, multiple: int, min_pixels: int, max_pixels: int) -> Size:
    """Sides rounded to ``multiple``, their product within the limits, the aspect kept as well as that allows.

    Halves round to even. A side that rounds to 0 counts as an area below ``min_pixels``, so both sides are scaled for
    that area and rounded up. Source: Qwen2-VL (arXiv 2409.12191), section 2.1, and ``smart_resize`` of its image
    processor in transformers. One step more than there: where limits within a factor of a few multiples of each other
    contradict, ``max_pixels`` holds, because it bounds memory.
    """
    new_height, new_width = round(height / multiple) * multiple, round(width / multiple) * multiple
    if new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / multiple) * multiple
        new_width = math.ceil(width * grow / multiple) * multiple
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(multiple, math.floor(height / shrink / multiple) * multiple)
        new_width = max(multiple, math.floor(width / shrink / multiple) * multiple)
        # A side that was lifted to one multiple leaves less for the other.
        if new_height * new_width > max_pixels:
            if new_height > new_width:
                new_height = max_pixels // (new_width * multiple) * multiple
            else:
                new_width = max_pixels // (new_height * multiple) * multiple
    return new_height, new_width


def longest_side_size(height: int, width: int, multiple: int, longest: int) -> Size:
    """Both sides reduced until neither is above ``longest``, then lifted to multiples; smaller images keep their size.

    Source: Pixtral (arXiv 2410.07073), section 2, with 1024 and 16; rounded down before lifting, as in transformers.
    """
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return lifted(max(height, 1), multiple), lifted(max(width, 1), multiple)


def shrunk_size(height: int, width: int, most: Size) -> Size:
    """The image's own size, or the largest of its aspect within ``most``.

    Source: Fuyu's image processor in transformers, with 1080 x 1920; there the sides are padded to multiples of 30.
    """
    if height <= most[0] and width <= most[1]:
        return height, width
    scale = min(most[0] / height, most[1] / width)
    return max(1, int(height * scale)), max(1, int(width * scale))


def lifted(side: int, multiple: int) -> int:
    """The next multiple, ``side`` itself if it is one."""
    return -(-side // multiple) * multiple


def fitted(size: Size, into: Size) -> Size:
    """The largest size of the image's aspect within ``into``, rounded down, at least one pixel a side."""
    height, width = size
    if height * into[1] > width * into[0]:
        return into[0], max(1, width * into[0] // height)
    return max(1, height * into[1] // width), into[1]
