"""Which image member of a sample each image of a page is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.image_header import is_image


def image_order(ext: str) -> tuple[int, str]:
    """Sort key of image members: numbered ones by number (2.png before 10.png), after the others by name."""
    stem = ext.rpartition(".")[0]
    return (int(stem), ext) if stem.isdecimal() else (-1, ext)


def image_member(name: str, members: Collection[str], key: str = "") -> str | None:
    """The image member that ``name`` means, if there is one; a URL means none, whatever it ends in.

    Args:
        name: As the member is called (``0.png``), or with the key of the sample before it, or any folder before that.
        members: Extensions of the sample.
        key: Of the sample.
    """
    if "://" in name:
        return None
    base = name.rpartition("/")[2].lower()
    stem = key.rpartition("/")[2].lower() + "."
    for ext in (name.lower(), base, base.removeprefix(stem)):
        if ext in members and is_image(ext):
            return ext
    return None


def page_images(
    references: Sequence[Any], places: Sequence[int], members: Collection[str], key: str = ""
) -> list[str | bytes]:
    """What stands for each image of a page that may name its images by URLs: a member, or bytes of the page itself.

    By name if all of them are members' names. Else by number: members are numbered from 0 or 1, or by the places of the
    images on the page. An only image needs neither.

    Args:
        references: What the page says of each image.
        places: Its place among all parts of the page.
        members: Extensions of the sample.
        key: Of the sample.

    Raises:
        SampleError: some images are named as members and others not, or members and images differ in number.
    """
    named = [one if isinstance(one, bytes) else _named(one, members, key) for one in references]
    found = [one for one in named if one is not None]
    if len(found) == len(references):
        return found
    if found:
        lost = references[named.index(None)]
        reason = f"the page names the image {lost!r:.80}; its members are {', '.join(sorted(members))}"
        raise SampleError(reason, kind=FaultKind.TEXT)
    images = sorted(filter(is_image, members), key=image_order)
    numbers = [image_order(ext)[0] for ext in images]
    count = len(references)
    if numbers in ([*range(count)], [*range(1, count + 1)], [*places]) or len(images) == count == 1:
        return list(images)
    raise SampleError(
        f"the page names {count} images, none of them as a member is called, and the sample holds {len(images)} "
        f"({', '.join(images) or 'none'}); expected one each, named as in the JSON or by number (0.jpg, 1.jpg, ...)",
        kind=FaultKind.TEXT,
    )


def _named(reference: Any, members: Collection[str], key: str) -> str | None:
    return image_member(reference, members, key) if isinstance(reference, str) else None
