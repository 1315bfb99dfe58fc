"""Where ingest finds its samples: a folder of images and texts, or a CSV or JSONL list.

Each source yields rows in a fixed order; a row is read when asked for, and refuses what does not exist.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.shards.files import sha256_of
from data_pipeline.shards.image_header import ImageFormat, image_size, is_image
from data_pipeline.shards.tar_members import split_name
from data_pipeline.shards.texts import all_texts, parse_json

PATH, CAPTION, PARTS, CAPTIONS = "path", "caption", "parts", "captions"
_EXTENSION = {ImageFormat.JPEG: "jpg", ImageFormat.PNG: "png", ImageFormat.WEBP: "webp"}
_KEY_DIGITS = 9


@dataclass(frozen=True)
class Row:
    """One sample to be: ``number`` counts from 1, ``read`` gives the members or raises ``SampleError``."""

    number: int
    key: str
    read: Callable[[], dict[str, bytes]]


class Source(Protocol):
    """Rows in a fixed order, and a digest that changes when they do."""

    def rows(self) -> Iterator[Row]: ...
    def digest(self) -> str: ...


def open_source(path: str | Path) -> Source:
    """The source for a folder, a ``.csv``, or a ``.jsonl``.

    Raises:
        DataConfigError: nothing is there, or it is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise DataConfigError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".csv":
        return ListSource(path, _csv_rows)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return ListSource(path, _jsonl_rows)
    raise DataConfigError(f"{path}: ingest takes a folder, a .csv or a .jsonl")


class FolderSource:
    """Images and same-stem ``.txt`` or ``.json`` files, below a folder; the stem is the key, the order is by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._samples: dict[str, dict[str, Path]] = {}
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if any(part.startswith(".") for part in relative.parts) or path.is_dir():
                continue
            key, ext = split_name(relative.as_posix()) or (relative.as_posix(), "")
            files = self._samples.setdefault(key, {})
            if ext in files:
                raise DataConfigError(f"{path} and {files[ext]} would be one member of one sample; rename one")
            files[ext] = path
        if not self._samples:
            raise DataConfigError(f"{folder}: no files to ingest")

    def rows(self) -> Iterator[Row]:
        for number, (key, files) in enumerate(sorted(self._samples.items()), 1):
            yield Row(number, key, lambda files=files: self._read(files))  # type: ignore[misc]

    def digest(self) -> str:
        names = [
            (path.relative_to(self._folder).as_posix(), path.stat().st_size)
            for files in self._samples.values()
            for path in files.values()
            if path.exists()
        ]
        return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()

    def _read(self, files: Mapping[str, Path]) -> dict[str, bytes]:
        members = {}
        for ext, path in files.items():
            if is_image(ext):
                members[ext] = _read_image(path)[1]
            elif ext in ("txt", "json"):
                members[ext] = _read_file(path)
            else:
                raise SampleError(f"{path}: neither an image (.jpg .jpeg .png .webp) nor .txt or .json")
        if "txt" in members:
            _check_utf8(members["txt"])
        if "json" in members:
            _check_parts(parse_json(members["json"]), members)
        return members


class ListSource:
    """A CSV or JSONL file: columns ``path`` and ``caption`` (or ``captions``, ``parts``), any others are kept.

    Paths are relative to the list. The number of the row is the key.
    """

    def __init__(self, path: Path, parse: Callable[[Path], Iterator[Callable[[], dict[str, Any]]]]) -> None:
        self._path, self._parse = path, parse

    def rows(self) -> Iterator[Row]:
        for number, parsed in enumerate(self._parse(self._path), 1):
            yield Row(number, f"{number:0{_KEY_DIGITS}d}", lambda parsed=parsed: self._read(parsed()))  # type: ignore[misc]

    def digest(self) -> str:
        return sha256_of(self._path)

    def _read(self, record: dict[str, Any]) -> dict[str, bytes]:
        record = {key: value for key, value in record.items() if value not in (None, "") or key == CAPTION}
        paths = record.pop(PATH, None)
        members: dict[str, bytes] = {}
        if PARTS in record:
            if paths is not None:
                raise SampleError("a row has either path or parts")
            record[PARTS] = [self._part(part, members) for part in _list_of_objects(record[PARTS])]
        for number, path in enumerate([paths] if isinstance(paths, str) else paths or []):
            ext, content = _read_image(self._path.parent / _text(path, PATH))
            members[ext if isinstance(paths, str) else f"{number}.{ext}"] = content
        if not members and not any(all_texts(record)):
            raise SampleError("neither an image (path) nor a text (caption, captions, parts)")
        all_texts(record)
        members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        return members

    def _part(self, part: dict[str, Any], members: dict[str, bytes]) -> dict[str, str]:
        if set(part) == {"text"}:
            return {"text": _text(part["text"], "text")}
        if set(part) != {"image"}:
            raise SampleError(f"a part with the fields {sorted(part)}; it must have just one, text or image")
        ext, content = _read_image(self._path.parent / _text(part["image"], "image"))
        name = f"{len(members)}.{ext}"
        members[name] = content
        return {"image": name}


def _csv_rows(path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if PATH not in columns and CAPTION not in columns:
            raise DataConfigError(f"{path}: needs a column {PATH} or {CAPTION} in its first line, found {columns}")
        try:
            for record in reader:
                yield lambda record=record: _csv_record(record)  # type: ignore[misc]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataConfigError(f"{path}, line {reader.line_num}: {error}") from error


def _csv_record(record: dict[str | None, Any]) -> dict[str, Any]:
    if None in record or None in record.values():
        raise SampleError("the row has not as many fields as the first line has names")
    return {str(key): value for key, value in record.items()}


def _jsonl_rows(path: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield lambda line=line: _json_record(line)  # type: ignore[misc]


def _json_record(line: bytes) -> dict[str, Any]:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise SampleError(f"the line holds a {type(record).__name__}, expected an object")
    return record


def _list_of_objects(parts: Any) -> list[dict[str, Any]]:
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise SampleError("parts must be a list of objects")
    return parts


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{name} must be a string, got {value!r:.60}")
    return value


def _read_file(path: Path) -> bytes:
    if not path.is_file():  # A pipe or a device would never end.
        raise SampleError(f"{path}: no such file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path}: cannot be read: {error.strerror}") from error


def _read_image(path: Path) -> tuple[str, bytes]:
    """(extension by content, bytes) of an image file."""
    content = _read_file(path)
    try:
        return _EXTENSION[image_size(content).format], content
    except SampleError as error:
        raise SampleError(f"{path}: {error.reason}") from error


def _check_utf8(content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the text is no UTF-8: {error}") from error


def _check_parts(fields: Any, members: Mapping[str, bytes]) -> None:
    all_texts(fields)
    absent = [part["image"] for part in fields.get(PARTS) or () if "image" in part and part["image"] not in members]
    if absent:
        raise SampleError(f"the JSON names the images {absent}, the sample has {sorted(members)}")
