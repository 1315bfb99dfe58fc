"""Pages of text and images as a tar sample holds them: which text, which image member, in which order.

    parts                   [{"text": ...}, {"image": "0.png"}, ...]
    images, texts           (OBELICS) one of the two in each place, the other null
    text_list, image_info   (MMC4) each image before the text of its matched_text_index

Images are members of the same sample. Not for: which of the text is learned (``templates``), making shards
(``shards.records``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.sample import ImagePart, Part, TextPart
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.records import interleaved

Sizes = Mapping[str, tuple[int, int]]
"""Height and width of image members, as far as an index knows them."""

_MOST_WEIGHT = 1_000_000


def take_parts(fields: dict[str, Any], members: Mapping[str, bytes], sizes: Sizes, key: str) -> list[Part] | None:
    """The parts of a page, whose fields are taken out of ``fields``; None if the sample is no page.

    An image is named as its member is: ``0.png``, or with the key of the sample before it, whatever folder stands
    before that. In the form of OBELICS and MMC4 a page may name its images otherwise (URLs); then it takes the image
    members in their order, as many as it names.

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


def image_order(ext: str) -> tuple[int, str]:
    """Sort key of image members: numbered ones by number (2.png before 10.png), after the others by name."""
    stem = ext.rpartition(".")[0]
    return (int(stem), ext) if stem.isdecimal() else (-1, ext)


def default_images(members: Mapping[str, bytes], sizes: Sizes) -> list[ImagePart]:
    """All image members in their order."""
    return [_image(ext, members, sizes) for ext in sorted(filter(is_image, members), key=image_order)]


def weight_of(item: Mapping[str, Any]) -> float:
    """The loss weight that a stretch of text asks for; 1 if it asks for none.

    Raises:
        SampleError: it is no number from 0 to a million.
    """
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _MOST_WEIGHT:
        reason = f"a loss weight is {weight!r:.80}, expected a number from 0 to {_MOST_WEIGHT}"
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
    references = [item["image"] for item in listed if "image" in item]
    known = [isinstance(one, bytes) or (isinstance(one, str) and image_member(one, members, key)) for one in references]
    if any(known):
        order: list[ImagePart] = [_image_of(reference, members, sizes, key) for reference in references]
    else:
        order = default_images(members, sizes)
        if len(order) != len(references):
            raise SampleError(
                f"the page names {len(references)} images, none of them as a member is called, and the sample holds "
                f"{len(order)}",
                kind=FaultKind.TEXT,
            )
    images = iter(order)
    parts: list[Part] = []
    for item in listed:
        if "image" in item:
            parts.append(next(images))
        elif isinstance(item["text"], str):
            parts.append(TextPart(item["text"]))
        else:
            raise SampleError(f"a text of the page is {item['text']!r:.80}, expected a string", kind=FaultKind.TEXT)
    return parts


def _image_of(reference: Any, members: Mapping[str, bytes], sizes: Sizes, key: str) -> ImagePart:
    if isinstance(reference, bytes):
        return ImagePart(reference, "image_base64")
    ext = image_member(reference, members, key) if isinstance(reference, str) else None
    if ext is None:
        reason = f"the page names the image {reference!r:.80}; its members are {', '.join(members)}"
        raise SampleError(reason, kind=FaultKind.TEXT)
    return _image(ext, members, sizes)


def _image(ext: str, members: Mapping[str, bytes], sizes: Sizes) -> ImagePart:
    return ImagePart(members[ext], ext, sizes.get(ext))


def image_member(name: str, members: Mapping[str, bytes], key: str) -> str | None:
    """The image member that ``name`` means, if there is one; a URL means none, whatever it ends in."""
    if "://" in name:
        return None
    base = name.rpartition("/")[2].lower()
    stem = key.rpartition("/")[2].lower() + "."
    for ext in (name.lower(), base, base.removeprefix(stem)):
        if ext in members and is_image(ext):
            return ext
    return None
