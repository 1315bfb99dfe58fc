"""Match each image or video reference of a page to a member of the sample."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from data_pipeline.errors import FaultKind, SampleError
from data_pipeline.shards.image_header import is_image


def image_order(ext: str) -> tuple[int, str]:
    """Return a sort key for media members: named ones first, then numbered ones by number (2.png before 10.png)."""
    stem = ext.rpartition(".")[0]
    return (int(stem), ext) if stem.isdecimal() else (-1, ext)


def image_member(
    name: str, members: Collection[str], key: str = "", is_kind: Callable[[str], bool] = is_image
) -> str | None:
    """Return the extension of the image member that ``name`` refers to; None if there is none. A URL never matches.

    Args:
        name: The member's extension (``0.png``), or ``KEY.0.png``, optionally with a folder in front. Case is ignored.
        members: Extensions of the sample's members.
        key: Key of the sample.
        is_kind: Whether an extension is that of a wanted member: of an image, or ``is_video``.
    """
    if "://" in name:
        return None
    base = name.rpartition("/")[2].lower()
    stem = key.rpartition("/")[2].lower() + "."
    for ext in (name.lower(), base, base.removeprefix(stem)):
        if ext in members and is_kind(ext):
            return ext
    return None


def page_images(
    references: Sequence[Any], positions: Sequence[int], members: Collection[str], key: str = ""
) -> list[str | bytes]:
    """Return the member extension, or the embedded bytes, of each image of a page that may refer to images by URL.

    If every reference names a member, or is the image's bytes, images are matched by name. If none does, images are
    matched in order: the image members must be numbered from 0, from 1, or by the images' positions on the page. A
    single image also matches a single image member of any name.

    Args:
        references: The page's reference to each image: a name, a URL, or the image's bytes.
        positions: Index of each image among all parts of the page.
        members: Extensions of the sample's members.
        key: Key of the sample.

    Raises:
        SampleError: only some references name a member, or the members' number or numbering does not match the images.
    """
    named = [reference if isinstance(reference, bytes) else _named(reference, members, key) for reference in references]
    found = [image for image in named if image is not None]
    if len(found) == len(references):
        return found
    if found:
        lost = references[named.index(None)]
        reason = f"the page names the image {lost!r:.80}; its members are {', '.join(sorted(members))}"
        raise SampleError(reason, kind=FaultKind.TEXT)
    images = sorted(filter(is_image, members), key=image_order)
    numbers = [image_order(ext)[0] for ext in images]
    count = len(references)
    if numbers in ([*range(count)], [*range(1, count + 1)], [*positions]) or len(images) == count == 1:
        return list(images)
    raise SampleError(
        f"the page names {count} images, none of them by a member's name, and the sample has {len(images)} "
        f"({', '.join(images) or 'none'}); expected one each, named as in the JSON or by number (0.jpg, 1.jpg, ...)",
        kind=FaultKind.TEXT,
    )


def _named(reference: Any, members: Collection[str], key: str) -> str | None:
    return image_member(reference, members, key) if isinstance(reference, str) else None
