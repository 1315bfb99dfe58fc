"""One record (a JSON object, a line of CSV, a row of Parquet) and its images to the members of a sample.

    path, caption, captions, other fields       images, then the caption
    image_base64, caption, ...                  the same, the image in the record
    parts                                       text and images in reading order
    images, texts          (OBELICS)            one of the two in each place, in reading order
    messages or conversations (LLaVA), image    images, and the turns as they are
    text_list, image_info  (MMC4)               each image before the text that it was matched with

Whatever comes in, what goes out is one form: ``0.jpg``, ``1.png``, ... and ``json`` with ``caption``, ``captions`` or
``parts``. Images are told by their content, never by a name.
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
from data_pipeline.io.json_member import all_texts, parse_member
from data_pipeline.io.untrusted import read_bytes
from data_pipeline.prepare.rows import Members
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

PATH, CAPTION, CAPTIONS = "path", "caption", "captions"
SPOKEN = frozenset({"messages", "conversations", "annotations"})
"""Fields of dialogues and annotations."""
DROPPED_IMAGES = "dropped_images"
EXTENSION_OF_FORMAT = {ImageFormat.JPEG: "jpg", ImageFormat.PNG: "png", ImageFormat.WEBP: "webp"}
_MOST_FILE_BYTES = 1 << 31
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class FieldNames:
    """How the columns of a source are called here.

    Attributes:
        renamed: (new name, name in the source) pairs.
        dropped: Columns that are left out.
        guessed: As ``renamed``, but recognised and not asked for: a row may lack the column, or have the new name.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    guessed: tuple[tuple[str, str], ...] = ()

    def check(self, columns: Sequence[str], place: str) -> list[str]:
        """The columns under their new names.

        Raises:
            DataConfigError: a column that is to be renamed or dropped does not exist, or two would have one name.
        """
        absent = [name for name in (*(old for _, old in self.renamed), *self.dropped) if name not in columns]
        if absent:
            raise DataConfigError(f"{place}: has no column {absent[0]!r}; it has {', '.join(columns)}")
        return list(self.apply(dict.fromkeys(columns), place))

    def apply(self, record: Mapping[str, Any], place: str = "") -> dict[str, Any]:
        """The record under new names.

        Raises:
            SampleError: a renamed field is missing, or two would have one name. (DataConfigError with ``place``.)
        """
        result = {name: value for name, value in record.items() if name not in self.dropped}
        for new, old in self.renamed:
            problem = None
            if old not in result:
                problem = f"has no field {old!r}"
            elif new in result and new != old:
                problem = f"has both {new!r} and {old!r}, which is to be called {new!r}: drop one of them"
            if problem is not None:
                raise DataConfigError(f"{place}: {problem}") if place else SampleError(f"the row {problem}")
            result[new] = result.pop(old)
        for new, old in self.guessed:
            if old in result and new not in result:
                result[new] = result.pop(old)
        return result


def members_of(record: Mapping[str, Any], load: Callable[[Any], bytes], lenient: bool = False) -> Members:
    """The members of a sample.

    Args:
        record: Its fields; None, NaN and empty strings count as absent, but for an empty caption.
        load: Content of an image from what the record says of it: a path, bytes, a dict of both.
        lenient: Leave out images of a document that cannot be read, and count them in its ``dropped_images``.

    Raises:
        SampleError: an image or a text is missing or damaged, or the record holds neither.
    """
    fields = {key: value for key, value in record.items() if not _is_absent(value) or (key == CAPTION and value == "")}
    fields = interleaved(fields)
    paths = _take_images(fields)
    if IMAGE_BASE64 in fields:
        if paths is not None:
            raise SampleError(f"a row has either {PATH} or {IMAGE_BASE64}")
        paths = from_base64(fields.pop(IMAGE_BASE64))
    members: Members = {}
    if PARTS in fields:
        if paths is not None:
            raise SampleError("a row has either path or parts")
        listed = list_of_objects(fields[PARTS])
        fields[PARTS] = _readable_parts(listed, members, load) if lenient else _parts(listed, members, load)
        if len(fields[PARTS]) < len(listed):
            fields[DROPPED_IMAGES] = len(listed) - len(fields[PARTS])
    else:
        images = paths if isinstance(paths, list | tuple) else [] if paths is None else [paths]
        for number, path in enumerate(images):
            ext, content = image_of(path, load)
            members[ext if len(images) == 1 and not isinstance(paths, list | tuple) else f"{number}.{ext}"] = content
    if isinstance(fields.get(CAPTIONS), str) and fields[CAPTIONS].lstrip().startswith("["):
        fields[CAPTIONS] = parse_member(fields[CAPTIONS].encode())
    if not any(all_texts(fields)) and not members:
        raise SampleError("neither an image (path) nor a text (caption, captions, parts)")
    members["json"] = dump_json(fields)
    return members


def _take_images(fields: dict[str, Any]) -> Any:
    """What the record says of its images, taken out of it: ``path``; a dialogue may say ``image`` or ``images``."""
    names = (PATH, "image", IMAGES) if SPOKEN & fields.keys() else (PATH,)
    given = [name for name in names if name in fields]
    if len(given) > 1:
        raise SampleError(f"a row names its images in {' and in '.join(given)}; keep one (--drop {given[-1]})")
    return fields.pop(given[0]) if given else None


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
            f"a part with the fields {sorted(given)}; it must have just one, text (and its weight) or image"
        )
    ext, content = image_of(given["image"], load)
    name = f"{len(members)}.{ext}"
    members[name] = content
    return {"image": name}


def image_of(reference: Any, load: Callable[[Any], bytes]) -> tuple[str, bytes]:
    """(extension by content, bytes) of an image."""
    content = load(reference)
    try:
        return EXTENSION_OF_FORMAT[image_size(content).format], content
    except SampleError as error:
        place = f"{reference}: " if isinstance(reference, str) else ""
        raise SampleError(f"{place}{error.reason}") from error


@dataclass(frozen=True)
class FileLoader:
    """Images that a record names: files in one folder, or bytes in the record itself. Nothing is downloaded.

    Attributes:
        folder: Paths are relative to it and must not leave it.
        holds_urls: Whether files of URLs lie there, under the URL without its scheme: what ``wget -x`` makes.
    """

    folder: Path
    holds_urls: bool = False

    def __call__(self, reference: Any) -> bytes:
        if isinstance(reference, bytes):
            return reference
        if isinstance(reference, Mapping) and set(reference) <= {"bytes", "path"}:
            content = reference.get("bytes")
            if isinstance(content, str):  # JSON holds no bytes.
                return from_base64(content)
            return content if isinstance(content, bytes) else self(reference.get("path"))
        path = text_of(reference, "an image's path")
        if _DATA_URL.match(path):
            return from_base64(path.partition(",")[2])
        if _URL.match(path):
            if not self.holds_urls:
                raise SampleError(
                    f"{path}: a URL; ingest downloads nothing: fetch with img2dataset and ingest its tars, or name the "
                    "folder of files that wget -x made with --images"
                )
            path = path.partition("://")[2]
        root = os.path.abspath(self.folder)
        if os.path.commonpath([root, os.path.abspath(self.folder / path)]) != root:
            raise SampleError(f"{path}: lies outside of {self.folder}; name the folder of the images with --images")
        return read_file(self.folder / path)


def read_file(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        SampleError: there is none, or it cannot be read.
    """
    try:
        return read_bytes(path, most_bytes=_MOST_FILE_BYTES)
    except FileNotFoundError as error:
        raise SampleError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name.
        raise SampleError(f"{path}: cannot be read: {error}") from error


def checked(members: Members) -> Members:
    """Members as they were found, once they are known to be usable; images get the extension of their content.

    Raises:
        SampleError: a damaged image, text or JSON; ``parts`` that name an absent image; neither image nor text.
    """
    names = {ext: _name_by_content(ext, content) for ext, content in members.items() if is_image(ext)}
    result = {names.get(ext, ext): content for ext, content in members.items()}
    if len(result) < len(members):
        raise SampleError(f"two of the members {sorted(members)} hold one format and would have one name")
    if "txt" in members:
        check_utf8(members["txt"])
    if "json" in members:
        fields = parse_member(members["json"])
        all_texts(fields)
        if _rename_parts(fields, names):
            result["json"] = dump_json(fields)
    if not names and "txt" not in members and "json" not in members:
        raise SampleError(f"neither an image (.jpg .jpeg .png .webp) nor .txt or .json among {sorted(members)}")
    return result


def _name_by_content(ext: str, content: bytes) -> str:
    try:
        found = image_size(content).format
    except SampleError as error:
        raise SampleError(f".{ext}: {error.reason}") from error
    stem, dot, kind = ext.rpartition(".")
    return ext if FORMAT_OF_EXTENSION[kind] is found else f"{stem}{dot}{EXTENSION_OF_FORMAT[found]}"


def _rename_parts(fields: dict[str, Any], names: Mapping[str, str]) -> bool:
    """Whether a part names an image by another name than it now has; it is corrected in place."""
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
    """The text of a ``txt`` member.

    Raises:
        SampleError: it is no UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is no UTF-8: {error}") from error


def dump_json(fields: Mapping[str, Any]) -> bytes:
    """A JSON member. Dates become ISO strings, decimals strings, NaN and infinities null.

    Raises:
        SampleError: a field holds what JSON cannot, bytes for instance.
    """
    try:
        return _dumps(fields)
    except (TypeError, ValueError):  # Rare, so the field at fault is looked for only now.
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
