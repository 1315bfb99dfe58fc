"""Convert one record (a JSON object, a line of CSV, a row of Parquet) and its images to the members of a sample.

    path, caption, captions, other fields       images, then the caption
    image_base64, caption, ...                  the same, with the image in the record
    parts                                       text and images in reading order
    images, texts          (OBELICS)            two lists in reading order; at each position one of them is null
    messages or conversations (LLaVA), image    images, and the turns unchanged
    messages with {"type": "image", "image": F} the same, with the images taken out of the turns
    text_list, image_info  (MMC4)               each image before the text that it was matched with
    prompt, chosen, rejected, image             images, and the preference pair unchanged

The result has one form: an image member ``jpg``, or ``0.jpg``, ``1.png``, ... for several, and a ``json`` with
``caption``, ``captions``, ``parts`` or the turns. An image's extension follows its content, not its name.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.json_member import PAIR, all_texts, check_pair, parse_member
from data_pipeline.io.untrusted import read_bytes
from data_pipeline.prepare.rows import Members
from data_pipeline.shards.audio_file import audio_size
from data_pipeline.shards.image_header import FORMAT_OF_EXTENSION, ImageFormat, image_size, is_image
from data_pipeline.shards.interleaved import (
    IMAGE_BASE64,
    IMAGES,
    PARTS,
    from_base64,
    interleaved,
    list_of_objects,
    text_of,
)
from data_pipeline.shards.media_kind import MEDIA_FORMATS, media_kind
from data_pipeline.shards.video_file import video_size

PATH, CAPTION, CAPTIONS = "path", "caption", "captions"
SPOKEN = frozenset({"messages", "conversations", "annotations", *PAIR})
"""Fields of dialogues, annotations and preference pairs."""
ANSWERS = frozenset({"answer", "answers", "response", "output", "completion"})
"""Fields of an answer to a question in another field. ``template.answers`` names them."""
DROPPED_IMAGES = "dropped_images"
EXTENSION_OF_FORMAT = {ImageFormat.JPEG: "jpg", ImageFormat.PNG: "png", ImageFormat.WEBP: "webp"}
_MOST_FILE_BYTES = 1 << 31
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class FieldNames:
    """Renames and drops of a source's columns.

    Attributes:
        renamed: (new name, name in the source) pairs that the user asked for. The column must exist.
        dropped: Columns to leave out.
        guessed: Pairs as in ``renamed``, detected by ``column_names``. Rows without the column, or with a column of
            the new name, are left as they are.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    guessed: tuple[tuple[str, str], ...] = ()

    def check(self, columns: Sequence[str], location: str) -> list[str]:
        """Return the columns under their new names.

        Args:
            columns: Column names of the source.
            location: Beginning of an error message.

        Raises:
            DataConfigError: a column to rename or drop does not exist, or two columns would have one name.
        """
        absent = [name for name in (*(old for _, old in self.renamed), *self.dropped) if name not in columns]
        if absent:
            raise DataConfigError(f"{location}: has no column {absent[0]!r}; it has {', '.join(columns)}")
        return list(self.apply(dict.fromkeys(columns), location))

    def apply(self, record: Mapping[str, Any], location: str = "") -> dict[str, Any]:
        """Return the record under its new names.

        Raises:
            SampleError: a field to rename is missing, or two fields would have one name.
            DataConfigError: the same, if ``location`` is given.
        """
        result = {name: value for name, value in record.items() if name not in self.dropped}
        for new, old in self.renamed:
            problem = None
            if old not in result:
                problem = f"has no field {old!r}"
            elif new in result and new != old:
                problem = f"has both {new!r} and {old!r}, which is to be renamed {new!r}: drop one of them"
            if problem is not None:
                raise DataConfigError(f"{location}: {problem}") if location else SampleError(f"the row {problem}")
            result[new] = result.pop(old)
        for new, old in self.guessed:
            if old in result and new not in result:
                result[new] = result.pop(old)
        return result


def members_from_record(record: Mapping[str, Any], load: Callable[[Any], bytes], lenient: bool = False) -> Members:
    """Return the members of the sample that a record describes.

    Args:
        record: The record's fields. None, NaN and empty strings count as absent, except an empty ``caption``.
        load: Returns an image's bytes, given the record's reference to it: a path, bytes, or a dict of both.
        lenient: Leave unreadable images out of ``parts`` and store their count in the field ``dropped_images``.

    Raises:
        SampleError: an image or a text is missing or damaged, the record has neither, or several fields name images.
    """
    fields = {key: value for key, value in record.items() if not _is_absent(value) or (key == CAPTION and value == "")}
    fields = interleaved(fields)
    paths = _pop_images(fields)
    if paths is None and SPOKEN & fields.keys():
        paths = _pop_images_of_turns(fields)
    if IMAGE_BASE64 in fields:
        if paths is not None:
            raise SampleError(f"the row has both {PATH} and {IMAGE_BASE64}: drop one of them")
        paths = from_base64(fields.pop(IMAGE_BASE64))
    members: Members = {}
    if PARTS in fields:
        if paths is not None:
            raise SampleError("the row has both an image and parts: drop one of them")
        listed = list_of_objects(fields[PARTS])
        fields[PARTS] = _readable_parts(listed, members, load) if lenient else _parts(listed, members, load)
        if len(fields[PARTS]) < len(listed):
            fields[DROPPED_IMAGES] = len(listed) - len(fields[PARTS])
    else:
        images = paths if isinstance(paths, list | tuple) else [] if paths is None else [paths]
        for number, path in enumerate(images):
            ext, content = load_image(path, load)
            members[ext if len(images) == 1 and not isinstance(paths, list | tuple) else f"{number}.{ext}"] = content
    if isinstance(fields.get(CAPTIONS), str) and fields[CAPTIONS].lstrip().startswith("["):
        fields[CAPTIONS] = parse_member(fields[CAPTIONS].encode())
    if record.keys() >= {*PAIR}:  # Not ``fields``, which lacks an empty answer.
        check_pair(fields, *PAIR)
    if not any(all_texts(fields)) and not members and not (ANSWERS & fields.keys()):
        raise SampleError("neither an image (path) nor a text (caption, captions, parts)")
    members["json"] = dump_json(fields)
    return members


def _pop_images(fields: dict[str, Any]) -> Any:
    """Remove and return the reference to the images: ``path``, or in a dialogue also ``image`` or ``images``."""
    names = (PATH, "image", IMAGES) if SPOKEN & fields.keys() else (PATH,)
    given = [name for name in names if name in fields]
    if len(given) > 1:
        raise SampleError(f"the row names its images in {' and in '.join(given)}; keep one (--drop {given[-1]})")
    return fields.pop(given[0]) if given else None


def _pop_images_of_turns(fields: dict[str, Any]) -> list[Any] | None:
    """Remove the references to image files from the contents of turns, and return them in order; None for none.

    ``{"type": "image", "image": "a.jpg"}`` (also ``path`` or ``url``) and ``{"type": "image_url", "image_url": {"url":
    ...}}`` become ``{"type": "image"}``. ``fields`` gets new lists of turns; the record's own are not changed.
    """
    found: list[Any] = []

    def without_reference(item: Any) -> Any:
        if not isinstance(item, Mapping) or item.get("type") not in ("image", "image_url"):
            return item
        nested = item.get("image_url")
        references = [item.get(name) for name in ("image", PATH, "url")]
        references.append(nested.get("url") if isinstance(nested, Mapping) else nested)
        found.extend([reference for reference in references if reference is not None][:1])
        return {"type": "image"}

    for name in ("messages", "conversations", "prompt"):
        turns = fields.get(name)
        if isinstance(turns, list):
            fields[name] = [
                {**turn, "content": [without_reference(item) for item in turn["content"]]}
                if isinstance(turn, Mapping) and isinstance(turn.get("content"), list)
                else turn
                for turn in turns
            ]
    return found or None


def _parts(listed: list[dict[str, Any]], members: Members, load: Callable[[Any], bytes]) -> list[dict[str, str]]:
    return [_part(part, members, load) for part in listed]


def _readable_parts(
    listed: list[dict[str, Any]], members: Members, load: Callable[[Any], bytes]
) -> list[dict[str, str]]:
    parts = []
    for part in listed:
        try:
            parts.append(_part(part, members, load))
        except SampleError:
            if part.get("image") is None:
                raise
    return parts


def _part(part: Mapping[str, Any], members: Members, load: Callable[[Any], bytes]) -> dict[str, Any]:
    given = {key: value for key, value in part.items() if value is not None}
    if "text" in given and set(given) <= {"text", "weight"}:
        return {**given, "text": text_of(given["text"], "text")}
    if set(given) != {"image"}:
        raise SampleError(
            f"a part has the fields {sorted(given)}; expected text (and maybe its weight), or image alone"
        )
    ext, content = load_image(given["image"], load)
    name = f"{len(members)}.{ext}"
    members[name] = content
    return {"image": name}


def load_image(reference: Any, load: Callable[[Any], bytes]) -> tuple[str, bytes]:
    """Return (extension, bytes) of an image; the extension follows the content.

    Raises:
        SampleError: the image cannot be loaded, or its header is damaged or of another format.
    """
    content = load(reference)
    try:
        return EXTENSION_OF_FORMAT[image_size(content).format], content
    except SampleError as error:
        location = f"{reference}: " if isinstance(reference, str) else ""
        raise SampleError(f"{location}{error.reason}") from error


@dataclass(frozen=True)
class FileLoader:
    """Load the images that a record names: files in one folder, or bytes in the record. Nothing is downloaded.

    Attributes:
        folder: Folder of relative paths. A path that leads outside is a ``SampleError``.
        holds_urls: Read a URL from the file ``folder``/URL-without-scheme, the layout that ``wget -x`` writes.
    """

    folder: Path
    holds_urls: bool = False

    def __call__(self, reference: Any) -> bytes:
        if isinstance(reference, bytes):
            return reference
        if isinstance(reference, Mapping) and set(reference) <= {"bytes", "path"}:
            content = reference.get("bytes")
            if isinstance(content, str):  # JSON cannot hold bytes, so they are in base64.
                return from_base64(content)
            return content if isinstance(content, bytes) else self(reference.get("path"))
        path = text_of(reference, "an image's path")
        if _DATA_URL.match(path):
            return from_base64(path.partition(",")[2])
        return read_file(self.path_of(path))

    def path_of(self, path: str) -> Path:
        """Return the file that a path or a URL names.

        Raises:
            SampleError: it is outside of the folder, or a URL although the folder holds none.
        """
        if _URL.match(path):
            if not self.holds_urls:
                raise SampleError(
                    f"{path}: a URL; ingest downloads nothing: fetch with img2dataset and ingest its tars, or give the "
                    "folder of files that wget -x made with --images"
                )
            path = path.partition("://")[2]
        root = os.path.abspath(self.folder)
        if os.path.commonpath([root, os.path.abspath(self.folder / path)]) != root:
            raise SampleError(f"{path}: outside of {self.folder}; give the folder of the images with --images")
        return self.folder / path


def read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        SampleError: the file is missing, cannot be read, or is larger than 2 GiB.
    """
    try:
        return read_bytes(path, most_bytes=_MOST_FILE_BYTES)
    except FileNotFoundError as error:
        raise SampleError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name.
        raise SampleError(f"{path}: cannot be read: {error}") from error


def validated_members(members: Members) -> Members:
    """Check members and return them; an image whose content differs from its extension is renamed.

    Raises:
        SampleError: an image header, a video, a sound, a text or JSON is damaged, ``parts`` name an absent image, two
            images would have one name, or there is neither a medium nor a ``.txt`` or ``.json``. A JSON without a text
            does not raise.
    """
    names = {ext: _name_by_content(ext, content) for ext, content in members.items() if is_image(ext)}
    result = {names.get(ext, ext): content for ext, content in members.items()}
    if len(result) < len(members):
        raise SampleError(f"two of the members {sorted(members)} hold the same format and would have one name")
    clips = [ext for ext in members if media_kind(ext) in ("video", "audio")]
    for ext in clips:
        try:
            _ = video_size(members[ext]) if media_kind(ext) == "video" else audio_size(members[ext])
        except SampleError as error:
            raise SampleError(f".{ext}: {error.reason}") from error
    if "txt" in members:
        check_utf8(members["txt"])
    if "json" in members:
        fields = parse_member(members["json"])
        all_texts(fields)
        if _rename_parts(fields, names):
            result["json"] = dump_json(fields)
    if not names and not clips and "txt" not in members and "json" not in members:
        raise SampleError(f"neither {MEDIA_FORMATS} nor .txt or .json among {sorted(members)}")
    return result


def _name_by_content(ext: str, content: bytes) -> str:
    try:
        found = image_size(content).format
    except SampleError as error:
        raise SampleError(f".{ext}: {error.reason}") from error
    stem, dot, kind = ext.rpartition(".")
    return ext if FORMAT_OF_EXTENSION[kind] is found else f"{stem}{dot}{EXTENSION_OF_FORMAT[found]}"


def _rename_parts(fields: dict[str, Any], names: Mapping[str, str]) -> bool:
    """Correct, in place, the parts that name an image by its old extension; return whether one was changed."""
    changed = False
    for part in fields.get(PARTS) or ():
        if "image" not in part:
            continue
        name = part["image"]
        if not isinstance(name, str) or name.lower() not in names:
            raise SampleError(f"the JSON names the image {name!r}, the sample has {sorted(names)}")
        if names[name.lower()] != name.lower():
            part["image"], changed = names[name.lower()], True
    return changed


def check_utf8(content: bytes) -> str:
    """Return the text of a ``txt`` member.

    Raises:
        SampleError: the bytes are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is not UTF-8: {error}") from error


def dump_json(fields: Mapping[str, Any]) -> bytes:
    """Return a JSON member. Dates become ISO strings, decimals strings, and NaN and infinities null.

    Raises:
        SampleError: a field holds a value that JSON cannot hold, such as bytes.
    """
    try:
        return _dumps(fields)
    except (TypeError, ValueError):  # Rare, so the search for the field at fault may be slow.
        fields = _without_nan(fields)
    for name, value in fields.items():
        try:
            _dumps(value)
        except (TypeError, ValueError) as error:
            raise SampleError(f"the field {name!r} cannot become JSON: {error}; leave it out (--drop)") from error
    return _dumps(fields)


def _dumps(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_as_json)
    return text.encode()


def _as_json(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):  # datetime is a date.
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
