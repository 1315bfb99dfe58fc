"""Published rules for the size of an uncut image, for vision towers that accept any size."""

from __future__ import annotations

import math

Size = tuple[int, int]
"""(height, width) in pixels."""


def area_size(height: int, width: int, multiple: int, min_pixels: int, max_pixels: int) -> Size:
    """Return a size with sides that are multiples of ``multiple`` and an area within the limits, close to the aspect.

    Halves round to even. If a side rounds to 0, the area is 0 and thus below ``min_pixels``: both sides are then scaled
    to that area and rounded up. Source: Qwen2-VL (arXiv 2409.12191), section 2.1, and ``smart_resize`` of its image
    processor in transformers. This function adds one step: if rounding makes the limits contradict each other,
    ``max_pixels`` wins, because it bounds memory.
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
        # If one side was raised to a whole multiple, the other one must be smaller.
        if new_height * new_width > max_pixels:
            if new_height > new_width:
                new_height = max_pixels // (new_width * multiple) * multiple
            else:
                new_width = max_pixels // (new_height * multiple) * multiple
    return new_height, new_width


def longest_side_size(height: int, width: int, multiple: int, longest: int) -> Size:
    """Scale both sides down so that neither exceeds ``longest``, then round them up to multiples.

    Smaller images are not scaled. Source: Pixtral (arXiv 2410.07073), section 2, with 1024 and 16. The scaled sides are
    rounded down before they are rounded up to multiples, as in transformers.
    """
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    return round_up(max(height, 1), multiple), round_up(max(width, 1), multiple)


def longest_edge_size(height: int, width: int, longest: int, most: int = 4096) -> Size:
    """Return the size whose longer side is ``longest``, but at most ``most``; smaller images are enlarged.

    The shorter side is rounded down, then up to an even number. Source: Idefics3's image processor in transformers.
    """
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > most:
        width, height = most, int(most / aspect)
    elif height > width and height > most:
        height, width = most, int(most * aspect)
    return max(height, 1), max(width, 1)


def whole_tiles_size(height: int, width: int, side: int) -> Size:
    """Return the size with the longer side, then the shorter one at the new scale, rounded up to multiples of ``side``.

    Source: ``resize_for_vision_encoder`` of Idefics3's image processor in transformers.
    """
    aspect = width / height
    if width >= height:
        width = round_up(width, side)
        return round_up(max(int(width / aspect), 1), side), width
    height = round_up(height, side)
    return height, round_up(max(int(height * aspect), 1), side)


def shrunk_size(height: int, width: int, most: Size) -> Size:
    """Return the image's size if it is within ``most``, else the largest size of its aspect within ``most``.

    Source: Fuyu's image processor in transformers, with 1080 x 1920. Its padding to multiples of 30 is not done here.
    """
    if height <= most[0] and width <= most[1]:
        return height, width
    scale = min(most[0] / height, most[1] / width)
    return max(1, int(height * scale)), max(1, int(width * scale))


def round_up(side: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``side``."""
    return -(-side // multiple) * multiple


def fitted(size: Size, into: Size) -> Size:
    """Return the largest size of the image's aspect within ``into``, rounded down, with at least one pixel per side."""
    height, width = size
    if height * into[1] > width * into[0]:
        return into[0], max(1, width * into[0] // height)
    return max(1, height * into[1] // width), into[1]
