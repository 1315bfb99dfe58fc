"""Convert a sample's members from another tool's layout to members as training reads them.

plain         images, .txt, .json with caption, captions or parts
img2dataset   .jpg, .txt, .json with status, url, width, ...: the caption moves to the .json; failed downloads raise
OBELICS       .0.jpg, .1.jpg, ... and .json with images and texts: at each position one of the two is null
MMC4          .json with text_list and image_info; images as members, by number or name, or in image_base64
"""

from __future__ import annotations

import gzip
import io
import zlib
from enum import Enum
from typing import Any

from data_pipeline.errors import SampleError
from data_pipeline.io.json_member import parse_member
from data_pipeline.prepare.media_files import load_image
from data_pipeline.prepare.records import CAPTION, CAPTIONS, check_utf8, dump_json, validated_members
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.interleaved import IMAGE_INFO, IMAGES, PARTS, TEXT_LIST, TEXTS, interleaved, text_of
from data_pipeline.shards.page_images import page_images

_SUCCESS = "success"
_MAX_UNPACKED_BYTES = 1 << 28


class SampleLayout(str, Enum):
    """Layout of a sample's members in a tar. The value describes it to the user."""

    PLAIN = "webdataset tars, members as they are"
    IMG2DATASET = "webdataset tars of img2dataset (LAION, DataComp)"
    OBELICS = "webdataset tars of documents like OBELICS (images, texts)"
    MMC4 = "webdataset tars of documents like MMC4 (text_list, image_info)"

    @property
    def description(self) -> str:
        return self.value

    @property
    def convert(self) -> Any:
        """The function that converts members of this layout; it raises ``SampleError`` for an unusable sample."""
        return {
            SampleLayout.PLAIN: validated_members,
            SampleLayout.IMG2DATASET: from_img2dataset,
            SampleLayout.OBELICS: from_document,
            SampleLayout.MMC4: from_document,
        }[self]


def gunzip_members(members: Members) -> Members:
    """Return the members decompressed: ``txt.gz`` becomes ``txt``, as webdataset does when it decodes.

    Raises:
        SampleError: the gzip data is damaged, decompresses to more than 256 MiB, or two members would have one name.
    """
    result: Members = {}
    for ext, content in members.items():
        name = ext.removesuffix(".gz")
        result[name] = content if name == ext else _gunzip(ext, content)
    if len(result) < len(members):
        raise SampleError(f"two of the members {sorted(members)} would have one name, decompressed")
    return result


def _gunzip(ext: str, content: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            data = file.read(_MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SampleError(f".{ext}: not a readable gzip file: {error}") from error
    if len(data) > _MAX_UNPACKED_BYTES:
        raise SampleError(f".{ext}: decompresses to more than {_MAX_UNPACKED_BYTES} bytes")
    return data


def guess_layout(members: Members) -> SampleLayout:
    """Return the layout that the fields of a sample's JSON suggest; ``PLAIN`` without a readable JSON."""
    try:
        fields = _fields(members)
    except SampleError:
        return SampleLayout.PLAIN
    if {IMAGES, TEXTS} <= set(fields):
        return SampleLayout.OBELICS
    if {TEXT_LIST, IMAGE_INFO} <= set(fields):
        return SampleLayout.MMC4
    if "status" in fields and ("url" in fields or "key" in fields):
        return SampleLayout.IMG2DATASET
    return SampleLayout.PLAIN


def _fields(members: Members) -> dict[str, Any]:
    if "json" not in members:
        raise SampleError(f"no .json among {sorted(members)}")
    fields = parse_member(members["json"])
    if not isinstance(fields, dict):
        raise SampleError(f"the JSON holds a {type(fields).__name__}, expected an object")
    return fields


def from_img2dataset(members: Members) -> Members:
    """Return members with the caption in the JSON only; a JSON that already has the caption stays unchanged.

    If the .txt differs from the JSON's caption (because the images were captioned anew, for example), both become
    ``captions``, the .txt first.

    Raises:
        SampleError: the status is not ``success``, or a member is damaged.
    """
    fields = _fields(members)
    if fields.get("status", _SUCCESS) != _SUCCESS:
        raise SampleError(f"status {fields['status']!r}: {fields.get('error_message')}")
    result = {ext: content for ext, content in members.items() if ext != "txt"}
    if "txt" in members:
        text, caption = check_utf8(members["txt"]), fields.get(CAPTION)
        if caption is None:
            result["json"] = dump_json({**fields, CAPTION: text})
        elif caption != text:
            others = {name: value for name, value in fields.items() if name != CAPTION}
            result["json"] = dump_json({**others, CAPTIONS: [text, text_of(caption, CAPTION)]})
    return validated_members(result)


def from_document(members: Members) -> Members:
    """Return an OBELICS or MMC4 document as ``parts`` with numbered image members.

    Raises:
        SampleError: the JSON is neither of the two, or an image is missing or damaged.
    """
    fields = interleaved(_fields(members))
    if not isinstance(fields.get(PARTS), list):
        raise SampleError(f"neither {IMAGES} and {TEXTS} nor {TEXT_LIST} and {IMAGE_INFO} in the JSON")
    result = {ext: content for ext, content in members.items() if not is_image(ext) and ext != "json"}
    positions = [position for position, part in enumerate(fields[PARTS]) if "image" in part]
    found = page_images([fields[PARTS][position]["image"] for position in positions], positions, members)
    parts = list(fields[PARTS])
    for number, (position, image) in enumerate(zip(positions, found, strict=True)):
        content = image if isinstance(image, bytes) else members[image]
        ext, _ = load_image(content, lambda image: image)
        parts[position] = {"image": f"{number}.{ext}"}
        result[f"{number}.{ext}"] = content
    return validated_members({**result, "json": dump_json({**fields, PARTS: parts})})
