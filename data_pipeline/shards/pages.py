"""Pages of text and images as a tar sample holds them: which text, which image member, in which order.

    parts                   [{"text": ...}, {"image": "0.png"}, ...]
    images, texts           (OBELICS) one of the two in each place, the other null
    text_list, image_info   (MMC4) each image before the text of its matched_text_index

Images are members of the same sample. Not for: which of the text is learned (``templates``), making shards
(``shards.records``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import ImagePart, Part, TextPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.interleaved import interleaved
from data_pipeline.shards.page_images import image_member, image_order, page_images

Sizes = Mapping[str, tuple[int, int]]
"""Height and width of image members, as far as an index knows them."""

PAGE_FIELDS = frozenset(("parts", "images", "image_info"))
"""A sample whose JSON member has none of these is no page."""

MAX_WEIGHT = 1_000_000
"""Largest loss weight of a stretch of text."""


def take_parts(fields: dict[str, Any], members: Mapping[str, bytes], sizes: Sizes, key: str) -> list[Part] | None:
    """The parts of a page, whose fields are taken out of ``fields``; None if the sample is no page.

    An image is named as its member is: ``0.png``, or with the key of the sample before it, whatever folder stands
    before that. In the form of OBELICS and MMC4 a page may name its images otherwise (URLs): see ``page_images``.

    Args:
        fields: Of the JSON member.
        members: Bytes by extension.
        sizes: By extension.
        key: Of the sample.

    Raises:
        SampleError: the lists do not fit each other, or an image is not among the members.
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
    return _foreign(listed, members, sizes, key)


@functools.lru_cache(maxsize=1024)  # Most samples have the same few members.
def images_among(extensions: tuple[str, ...]) -> tuple[str, ...]:
    """The image members among these, in their order."""
    return tuple(sorted(filter(is_image, extensions), key=image_order))


def weight_of(item: Mapping[str, Any]) -> float:
    """The loss weight that a stretch of text asks for; 1 if it asks for none.

    Raises:
        SampleError: it is no number from 0 to a million.
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
    match item:
        case {"text": str(text)}:
            return TextPart(text, weight_of(item))
        case {"image": str(name)}:
            ext = image_member(name, members, key)
            if ext is None:
                reason = f"parts name the image {name!r}; its members are {', '.join(members)}"
                raise SampleError(reason, kind=FaultKind.TEXT)
            return _image(ext, members, sizes)
        case _:
            reason = f'a part is {item!r}, expected {{"text": ...}} or {{"image": ...}}'
            raise SampleError(reason, kind=FaultKind.TEXT)


def _foreign(listed: list[dict[str, Any]], members: Mapping[str, bytes], sizes: Sizes, key: str) -> list[Part]:
    """Parts whose images may go by names that are none here."""
    places = [place for place, item in enumerate(listed) if "image" in item]
    found = page_images([listed[place]["image"] for place in places], places, members, key)
    images = {
        place: ImagePart(one, "image_base64") if isinstance(one, bytes) else _image(one, members, sizes)
        for place, one in zip(places, found, strict=True)
    }
    parts: list[Part] = []
    for place, item in enumerate(listed):
        if place in images:
            parts.append(images[place])
        elif isinstance(item["text"], str):
            parts.append(TextPart(item["text"]))
        else:
            raise SampleError(f"a text of the page is {item['text']!r:.80}, expected a string", kind=FaultKind.TEXT)
    return parts


def _image(ext: str, members: Mapping[str, bytes], sizes: Sizes) -> ImagePart:
    return ImagePart(members[ext], ext, sizes.get(ext))
