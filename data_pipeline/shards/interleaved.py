"""Convert interleaved documents in the OBELICS or MMC4 format to one format: a list of text and image parts."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import SampleError
from data_pipeline.io.json_member import parse_member

PARTS = "parts"
IMAGES, TEXTS = "images", "texts"
TEXT_LIST, IMAGE_INFO = "text_list", "image_info"
IMAGE_BASE64 = "image_base64"


def interleaved(fields: dict[str, Any]) -> dict[str, Any]:
    """Return ``fields`` with the lists of OBELICS or MMC4 replaced by ``parts``.

    Image references are kept as they are stored, except that the base64 content of an MMC4 image is decoded. Other
    records are returned unchanged, as the same object. A ``parts`` string is parsed as JSON.

    Raises:
        SampleError: the lists do not match each other, or a ``parts`` string or a base64 content is invalid.
    """
    if isinstance(fields.get(PARTS), str):
        return {**fields, PARTS: parse_member(fields[PARTS].encode())}
    if PARTS in fields:
        return fields
    if IMAGES in fields and TEXTS in fields:
        parts = _obelics_parts(fields[IMAGES], fields[TEXTS])
        return {**{k: v for k, v in fields.items() if k not in (IMAGES, TEXTS)}, PARTS: parts}
    if TEXT_LIST in fields and IMAGE_INFO in fields:
        parts = _mmc4_parts(fields[TEXT_LIST], list_of_objects(fields[IMAGE_INFO], IMAGE_INFO))
        return {**{k: v for k, v in fields.items() if k not in (TEXT_LIST, IMAGE_INFO)}, PARTS: parts}
    return fields


def _obelics_parts(images: Any, texts: Any) -> list[dict[str, Any]]:
    """Source: Laurencon et al. 2023, "OBELICS", data card: at each index, one of the lists is null."""
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise SampleError("images and texts must be lists of equal length, with one of the two null at each index")
    parts: list[dict[str, Any]] = []
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise SampleError(f"index {number} of images and texts holds {'neither' if text is None else 'both'}")
        parts.append({"image": image} if text is None else {"text": text})
    return parts


def _mmc4_parts(texts: Any, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Source: Zhu et al. 2023, "Multimodal C4", data card: ``matched_text_index`` of each image."""
    if not isinstance(texts, list):
        raise SampleError("text_list must be a list")
    before: list[list[Any]] = [[] for _ in texts]
    for image in images:
        index = image.get("matched_text_index")
        if not isinstance(index, int) or not 0 <= index < len(texts):
            raise SampleError(f"matched_text_index={index!r} of an image, with {len(texts)} texts")
        before[index].append(_mmc4_image(image))
    parts: list[dict[str, Any]] = []
    for found, text in zip(before, texts, strict=True):
        parts += [*({"image": image} for image in found), {"text": text}]
    return parts


def _mmc4_image(image: Mapping[str, Any]) -> Any:
    encoded = image.get(IMAGE_BASE64)
    return image.get("image_name") if encoded is None else from_base64(encoded)


def from_base64(encoded: Any) -> bytes:
    """Decode base64; raise ``SampleError`` if ``encoded`` is not valid base64 text."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise SampleError(f"an image in the row is not valid base64: {error}") from error


def list_of_objects(parts: Any, name: str = PARTS) -> list[dict[str, Any]]:
    """Return ``parts``; raise ``SampleError`` if it is not a list of objects."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise SampleError(f"{name} must be a list of objects")
    return parts


def text_of(value: Any, name: str) -> str:
    """Return ``value``; raise ``SampleError`` if it is not a string."""
    if not isinstance(value, str):
        raise SampleError(f"{name} must be a string, got {value!r:.60}")
    return value
