"""Read the interleaved texts and images of a page from the JSON member of a tar sample, in order.

    parts                   [{"text": ...}, {"image": "0.png"}, {"video": "1.mp4"}, {"audio": "2.wav"}, ...];
                            ``frame_list`` for the frames of a video
    images, texts           (OBELICS) exactly one of the two is non-null at each index
    text_list, image_info   (MMC4) each image precedes the text of its matched_text_index

Images, videos and sounds are members of the same sample; images may be base64 in ``image_info``. ``text.templates``
decides which text is learned.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import AudioPart, AudioSize, ImagePart, MediaPart, Part, TextPart, VideoPart
from data_pipeline.shards.frame_list import VIDEOS, frame_members, lists_frames, stored_video
from data_pipeline.shards.interleaved import interleaved
from data_pipeline.shards.media_kind import MEDIA_KINDS, media_kind
from data_pipeline.shards.page_images import image_member, image_order, page_images
from data_pipeline.shards.token_grid import grid_extension

MediaSize = tuple[Any, ...]
"""Height and width of an image; a ``VideoSize`` and ``VideoPart.sound`` of a video; an ``AudioSize`` of a sound."""

Sizes = Mapping[str, MediaSize]
"""Sizes of images, videos and sounds, by extension. A member of unknown size is absent, or 0 in a dry run."""

PAGE_FIELDS = frozenset(("parts", "images", "image_info"))
"""Fields of a page. A JSON member without any of them is not a page."""

MAX_WEIGHT = 1_000_000
"""Largest loss weight of a text."""


def pop_page_parts(fields: dict[str, Any], members: Mapping[str, bytes], sizes: Sizes, key: str) -> list[Part] | None:
    """Remove the page's fields from ``fields`` and return its parts; return None if the sample is not a page.

    ``image_member`` describes how a part of ``parts`` names its image. A page in the OBELICS or MMC4 format may also
    refer to images by URL (``page_images``).

    Args:
        fields: Content of the JSON member. Changed.
        members: Bytes of each member, by extension.
        sizes: Known image sizes.
        key: Key of the sample.

    Raises:
        SampleError: the lists do not match each other, a part has a wrong form, or an image is no member.
    """
    listed = fields.pop("parts", None)
    if listed is not None:
        return [_part(item, members, sizes, key) for item in _objects(listed)]
    try:
        page = interleaved(fields)
    except SampleError as error:
        raise SampleError(error.reason, kind=FaultKind.TEXT) from error
    if page is fields:
        return None
    listed = page.pop("parts")
    fields.clear()
    fields.update(page)
    return _converted_parts(listed, members, sizes, key)


@functools.lru_cache(maxsize=1024)  # Most samples have the same few extensions.
def media_extensions(extensions: tuple[str, ...]) -> tuple[str, ...]:
    """Return the extensions of images, videos and sounds, sorted by ``image_order``."""
    return tuple(sorted((ext for ext in extensions if media_kind(ext) is not None), key=image_order))


def weight_of(item: Mapping[str, Any]) -> float:
    """Return the loss weight of a text, ``item["weight"]``; 1 by default.

    Raises:
        SampleError: the weight is not a number from 0 to ``MAX_WEIGHT``.
    """
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        reason = f"a loss weight is {weight!r:.80}, expected a number from 0 to {MAX_WEIGHT}"
        raise SampleError(reason, kind=FaultKind.TEXT)
    return float(weight)


def _objects(listed: Any) -> list[Any]:
    if not isinstance(listed, list):
        raise SampleError(f"parts is a {type(listed).__name__}, expected a list", kind=FaultKind.TEXT)
    return listed


def _part(item: Any, members: Mapping[str, bytes], sizes: Sizes, key: str) -> Part:
    fields = item if isinstance(item, dict) else {}
    if isinstance(fields.get("text"), str):
        return TextPart(fields["text"], weight_of(fields))
    if isinstance(fields.get("video"), list):
        return stored_video(fields, members, sizes, key)
    for kind, is_kind in MEDIA_KINDS.items():
        name = fields.get(kind)
        if isinstance(name, str):
            ext = image_member(name, members, key, is_kind)
            if ext is None:
                reason = f"parts name the {kind} {name!r}; its members are {', '.join(members)}"
                raise SampleError(reason, kind=FaultKind.TEXT)
            return media_part(ext, members, sizes)
    expected = '{"text": ...}, {"image": ...}, {"video": ...} or {"audio": ...}'
    raise SampleError(f"a part is {item!r}, expected {expected}", kind=FaultKind.TEXT)


def media_parts(fields: dict[str, Any], members: Mapping[str, bytes], sizes: Sizes, key: str) -> list[MediaPart]:
    """Return the images, videos and sounds of a sample that is not a page.

    These are the members in the order of ``image_order``. If the field ``videos`` names frames, it is removed from
    ``fields``, its videos follow the other members in its order, and its members are not listed a second time.

    Raises:
        SampleError: ``videos`` names frames, and one of its objects is malformed or names no member.
    """
    if VIDEOS not in fields or not lists_frames(fields):
        return [media_part(ext, members, sizes) for ext in media_extensions(tuple(members))]
    listed, videos, used = fields.pop(VIDEOS), list[MediaPart](), set[str]()
    for item in listed:
        video = _part(item, members, sizes, key) if isinstance(item, dict) and "video" in item else None
        if not isinstance(video, VideoPart):
            raise SampleError(f'videos lists {item!r:.80}, expected {{"video": ...}}', kind=FaultKind.TEXT)
        videos.append(video)
        used |= {*(frame_members(item, members, key) if isinstance(item["video"], list) else (video.name,))}
    rest = [ext for ext in media_extensions(tuple(members)) if ext not in used]
    return [*(media_part(ext, members, sizes) for ext in rest), *videos]


def _converted_parts(listed: list[dict[str, Any]], members: Mapping[str, bytes], sizes: Sizes, key: str) -> list[Part]:
    """Return the parts of a page converted from OBELICS or MMC4, whose images may be named by URL or embedded."""
    positions = [position for position, item in enumerate(listed) if "image" in item]
    found = page_images([listed[position]["image"] for position in positions], positions, members, key)
    images = {
        position: ImagePart(image, "image_base64") if isinstance(image, bytes) else media_part(image, members, sizes)
        for position, image in zip(positions, found, strict=True)
    }
    parts: list[Part] = []
    for position, item in enumerate(listed):
        if position in images:
            parts.append(images[position])
        elif isinstance(item["text"], str):
            parts.append(TextPart(item["text"]))
        else:
            raise SampleError(f"a text of the page is {item['text']!r:.80}, expected a string", kind=FaultKind.TEXT)
    return parts


def media_part(ext: str, members: Mapping[str, bytes], sizes: Sizes) -> MediaPart:
    """Return the sound of the member ``ext``, or its image or video, with its token grid if the sample has one."""
    data, size, kind = members[ext], sizes.get(ext), media_kind(ext)
    if kind == "audio":
        return AudioPart(data, ext, None if size is None else AudioSize(*size))
    if kind == "video":
        video, sound = (None, None) if size is None else size
        return VideoPart(data, ext, video, sound, members.get(grid_extension(ext)))
    return ImagePart(data, ext, None if size is None else (size[0], size[1]), members.get(grid_extension(ext)))
