"""Members of a sample as other tools lay them out, to members as training reads them.

plain         images, .txt, .json with caption, captions or parts
img2dataset   .jpg, .txt, .json with status, url, width, ...: one caption in the .json, failed downloads refused
OBELICS       .0.jpg, .1.jpg, ... and .json with images and texts, one of them null in each place
MMC4          .json with text_list and image_info; images beside it, by number or name, or in image_base64
"""

from __future__ import annotations

import gzip
import io
import zlib
from enum import Enum
from typing import Any

from data_pipeline.errors import SampleError
from data_pipeline.io.json_member import parse_member
from data_pipeline.prepare.records import CAPTION, CAPTIONS, check_utf8, checked, dump_json, image_of
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.interleaved import IMAGE_INFO, IMAGES, PARTS, TEXT_LIST, TEXTS, interleaved, text_of
from data_pipeline.shards.page_images import page_images

_SUCCESS = "success"
_MAX_UNPACKED_BYTES = 1 << 28


class Layout(str, Enum):
    """How a tool lays out a sample."""

    PLAIN = "webdataset tars, members as they are"
    IMG2DATASET = "webdataset tars of img2dataset (LAION, DataComp)"
    OBELICS = "webdataset tars of documents like OBELICS (images, texts)"
    MMC4 = "webdataset tars of documents like MMC4 (text_list, image_info)"

    @property
    def description(self) -> str:
        return self.value

    @property
    def convert(self) -> Any:
        """Members to members; raises ``SampleError`` for what cannot be used."""
        return {
            Layout.PLAIN: checked,
            Layout.IMG2DATASET: from_img2dataset,
            Layout.OBELICS: from_document,
            Layout.MMC4: from_document,
        }[self]


def unpacked(members: Members) -> Members:
    """Members without gzip: ``txt.gz`` becomes ``txt``, which webdataset does when it decodes.

    Raises:
        SampleError: the data is damaged, a bomb, or there is another member of that name.
    """
    result: Members = {}
    for ext, content in members.items():
        name = ext.removesuffix(".gz")
        result[name] = content if name == ext else _gunzip(ext, content)
    if len(result) < len(members):
        raise SampleError(f"two of the members {sorted(members)} would have one name, unpacked")
    return result


def _gunzip(ext: str, content: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            data = file.read(_MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SampleError(f".{ext}: no readable gzip: {error}") from error
    if len(data) > _MAX_UNPACKED_BYTES:
        raise SampleError(f".{ext}: unpacks to more than {_MAX_UNPACKED_BYTES} bytes")
    return data


def guess_layout(members: Members) -> Layout:
    """The layout that a sample seems to have."""
    try:
        fields = _fields(members)
    except SampleError:
        return Layout.PLAIN
    if {IMAGES, TEXTS} <= set(fields):
        return Layout.OBELICS
    if {TEXT_LIST, IMAGE_INFO} <= set(fields):
        return Layout.MMC4
    if "status" in fields and ("url" in fields or "key" in fields):
        return Layout.IMG2DATASET
    return Layout.PLAIN


def _fields(members: Members) -> dict[str, Any]:
    if "json" not in members:
        raise SampleError(f"no .json among {sorted(members)}")
    fields = parse_member(members["json"])
    if not isinstance(fields, dict):
        raise SampleError(f"the JSON holds a {type(fields).__name__}, expected an object")
    return fields


def from_img2dataset(members: Members) -> Members:
    """The caption once: in the JSON, which stays as it is where it has the caption already.

    A .txt that differs from the JSON's caption (a new caption, say) comes first of two ``captions``.
    """
    fields = _fields(members)
    if fields.get("status", _SUCCESS) != _SUCCESS:
        raise SampleError(f"status {fields['status']!r}: {fields.get('error_message')}")
    rest = {ext: content for ext, content in members.items() if ext != "txt"}
    if "txt" in members:
        text, caption = check_utf8(members["txt"]), fields.get(CAPTION)
        if caption is None:
            rest["json"] = dump_json({**fields, CAPTION: text})
        elif caption != text:
            others = {name: value for name, value in fields.items() if name != CAPTION}
            rest["json"] = dump_json({**others, CAPTIONS: [text, text_of(caption, CAPTION)]})
    return checked(rest)


def from_document(members: Members) -> Members:
    """A document of OBELICS or MMC4 gets ``parts``."""
    fields = interleaved(_fields(members))
    if not isinstance(fields.get(PARTS), list):
        raise SampleError(f"neither {IMAGES} and {TEXTS} nor {TEXT_LIST} and {IMAGE_INFO} in the JSON")
    result = {ext: content for ext, content in members.items() if not is_image(ext) and ext != "json"}
    images = [place for place, part in enumerate(fields[PARTS]) if "image" in part]
    found = page_images([fields[PARTS][place]["image"] for place in images], images, members)
    parts = list(fields[PARTS])
    for number, (place, one) in enumerate(zip(images, found, strict=True)):
        content = one if isinstance(one, bytes) else members[one]
        ext, _ = image_of(content, lambda image: image)
        parts[place] = {"image": f"{number}.{ext}"}
        result[f"{number}.{ext}"] = content
    return checked({**result, "json": dump_json({**fields, PARTS: parts})})
