"""Videos that are stored as images, one member for each frame, and named in the JSON member of a sample.

    {"video": ["0.0000.jpg", "0.0001.jpg", ...], "fps": 8}    a part of ``parts``, or an object of the list ``videos``

The rate comes from the JSON, and the sizes of the frames from the index, so such a video is planned like a video file.
``images.stored_frames`` decodes it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import StoredFrames, VideoPart, VideoSize
from data_pipeline.shards.page_images import image_member
from data_pipeline.shards.token_grid import grid_extension

VIDEOS = "videos"
"""Field of a sample that is not a page: a list of objects ``{"video": ..., "fps": ...}``."""
_MAX_FRAMES = 1 << 16
_MIN_RATE, _MAX_RATE = 1e-3, 1e4


def lists_frames(fields: Mapping[str, Any]) -> bool:
    """Return whether the field ``videos`` contains a video that is stored as images."""
    listed = fields.get(VIDEOS)
    return isinstance(listed, list) and any(
        isinstance(one, dict) and isinstance(one.get("video"), list) for one in listed
    )


def frame_members(item: Mapping[str, Any], members: Collection[str], key: str) -> tuple[str, ...]:
    """Return the member extension of each frame of ``{"video": [NAME, ...], "fps": RATE}``, in order.

    If the sample has the token ids of the video, frames after the first need not be members.

    Args:
        item: The object of the JSON member.
        members: Extensions of the sample's members.
        key: Key of the sample.

    Raises:
        SampleError: a name is not that of an image member, the list is empty or has more than 65536 names, or the rate
            is not a number from 0.001 to 10000.
    """
    names = item["video"]
    rate_of(item.get("fps"), len(names))
    found = list[str]()
    for name in names:
        ext = image_member(name, members, key) if isinstance(name, str) else None
        if ext is None and found and grid_extension(found[0]) in members and isinstance(name, str):
            ext = name.lower()
        if ext is None:
            raise _fault(f"a video names the frame {name!r:.80}, which is no image among the {len(members)} members")
        found.append(ext)
    return tuple(found)


def rate_of(rate: Any, num_frames: int) -> float:
    """Return the rate of a video of ``num_frames`` images; a string is read as a number.

    Raises:
        SampleError: the rate is not a number from 0.001 to 10000, or there are not 1 to 65536 frames.
    """
    if not 1 <= num_frames <= _MAX_FRAMES:
        raise _fault(f"a video has {num_frames} frames, expected 1 to {_MAX_FRAMES}")
    try:
        value = math.nan if isinstance(rate, bool) else float(rate)
    except (TypeError, ValueError, OverflowError):  # JSON has integers of any size.
        value = math.nan
    if not _MIN_RATE <= value <= _MAX_RATE:
        raise _fault(
            f"fps is {rate!r:.40}, expected the frames for each second of a video in frames, {_MIN_RATE:g} to "
            f"{_MAX_RATE:g}"
        )
    return value


def stored_video(
    item: Mapping[str, Any], members: Mapping[str, bytes], sizes: Mapping[str, tuple[int, ...]], key: str
) -> VideoPart:
    """Return the video of ``{"video": [NAME, ...], "fps": RATE}``; its name is that of its first frame.

    Args:
        item: The object of the JSON member.
        members: Bytes of each member, by extension.
        sizes: (height, width) of images, by extension; 0 for a damaged one. Without that of a frame, the video has no
            size.
        key: Key of the sample.

    Raises:
        SampleError: as ``frame_members``.
    """
    names = frame_members(item, members, key)
    frames = StoredFrames(tuple(members.get(name, b"") for name in names), rate_of(item["fps"], len(names)))
    known, grid = {sizes.get(name) for name in names}, members.get(grid_extension(names[0]))
    if None in known:
        return VideoPart(frames, names[0], grid=grid)
    (height, width), *others = ((one[0], one[1]) for one in known if one is not None)
    size = VideoSize(len(names), frames.microseconds, height, width)
    return VideoPart(frames, names[0], size if height and not others else VideoSize(0, 0, 0, 0), grid=grid)


def _fault(reason: str) -> SampleError:
    return SampleError(reason, kind=FaultKind.TEXT)
