"""CSV, TSV and JSONL as a source: a row a sample, images beside the list or inside it."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.checksums import sha256_of
from data_pipeline.io.json_member import parse_member
from data_pipeline.io.untrusted import UntrustedError, read_lines
from data_pipeline.prepare.recognised import METADATA, MOST_LINE_BYTES, new_names, told, with_file_name, with_text
from data_pipeline.prepare.records import CAPTION, CAPTIONS, PATH, SPOKEN, FieldNames, FileLoader, members_of
from data_pipeline.prepare.rows import Members, Row, read_each, spans_of
from data_pipeline.shards.interleaved import IMAGE_BASE64, IMAGES, PARTS, TEXT_LIST, TEXTS

KEY_DIGITS = 9
_DIALECTS = {"csv": "excel", "tsv": "excel-tab"}
_LIKELY_IMAGES = ("image", "images", "image_path", "img", "file_name", "filename", "filepath", "file", "url")
"""What other tools call the path of the image."""


class ListSource:
    """Rows with ``path`` or ``image_base64``, and ``caption``, ``captions`` or ``parts``; any other column is kept.

    The number of the row is the key.

    Args:
        path: The list.
        kind: ``csv``, ``tsv`` or ``jsonl``.
        names: New names for its columns.
        load: Reads the images that it names.
        lenient: Whether a document may lose images that cannot be read.

    Raises:
        DataConfigError: no column is an image or a text.
    """

    def __init__(self, path: Path, kind: str, names: FieldNames, load: FileLoader, lenient: bool = False) -> None:
        self._path, self._kind = path, kind
        is_table = kind in _DIALECTS
        first = dict.fromkeys(_csv_columns(path, kind), "") if is_table else _first_record(path)
        found = list(first)
        names = with_file_name(names, found) if path.name in METADATA else names
        could_be_text = {
            name: isinstance(value, list) for name, value in first.items() if isinstance(value, str | list)
        }
        names = with_text(names, found, could_be_text, str(path))
        if is_table:
            names.check(found, str(path))
        check_columns(path, new_names(names, found), is_table)
        self.reader = ListReader(load, names, lenient)
        self._count = sum(1 for _ in self._records())
        self.description = f"a {kind} list of {self._count:,} rows{told(names)}"

    def spans(self) -> Iterator[Sequence[Row]]:
        return spans_of(Row(n, f"{n:0{KEY_DIGITS}d}", record) for n, record in enumerate(self._records(), 1))

    def count(self) -> int:
        return self._count

    def digest(self) -> str:
        return hashlib.sha256(f"{self.reader!r} {sha256_of(self._path)}".encode()).hexdigest()

    def images(self) -> Iterator[Path]:
        """Files that the rows name as their images, whether or not they exist; unreadable rows name none."""
        for record in self._records():
            try:
                fields = self.reader.fields_of(record)
            except SampleError:
                continue
            parts = fields.get(PARTS)
            named = [part.get("image") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            for value in (fields.get(column) for column in (PATH, "image", IMAGES)):
                named += value if isinstance(value, list) else [value]
            yield from (Path(os.path.normpath(self.reader.load.folder / name)) for name in named if type(name) is str)

    def _records(self) -> Iterator[Any]:
        return _csv_rows(self._path, self._kind) if self._kind in _DIALECTS else _jsonl_rows(self._path)


@dataclass(frozen=True)
class ListReader:
    """Reads records: a line of JSON, or a record that is parsed already."""

    load: FileLoader
    names: FieldNames
    lenient: bool

    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        return read_each(rows, self.read_record)

    def read_record(self, record: bytes | Mapping[Any, Any]) -> Members:
        """The members of one record."""
        return members_of(self.fields_of(record), self.load, self.lenient)

    def fields_of(self, record: bytes | Mapping[Any, Any] | SampleError) -> dict[str, Any]:
        """The fields of one record, under their new names."""
        if isinstance(record, SampleError):
            raise record
        parsed = parse_member(record) if isinstance(record, bytes) else record
        if not isinstance(parsed, Mapping):
            raise SampleError(f"the line holds a {type(parsed).__name__}, expected an object")
        return self.names.apply(parsed)


def check_columns(path: Path, columns: Sequence[str], is_table: bool) -> None:
    """No row may become a text without its image only because the column has another name.

    Raises:
        DataConfigError: a column seems to be the image and is not called so, or a table has neither image nor text.
    """
    if {PATH, IMAGE_BASE64, PARTS, TEXTS, TEXT_LIST} & set(columns):
        return
    likely = [name for name in columns if name.lower() in _LIKELY_IMAGES]
    if likely:
        raise DataConfigError(
            f"{path}: has no column {PATH}, but {likely[0]}; if that is the image, say --column {PATH}={likely[0]}, "
            f"else --drop {likely[0]}; it has {', '.join(columns)}"
        )
    if is_table and not ({CAPTION, CAPTIONS} | SPOKEN) & set(columns):
        raise DataConfigError(
            f"{path}: needs a column {PATH} or {CAPTION}, found {', '.join(columns)}; "
            f"say which one it is, for example --column {CAPTION}={columns[-1] if columns else 'text'}"
        )


def _first_record(path: Path) -> dict[str, Any]:
    """The first readable line of a JSONL, empty if there is none; the rows' own errors tell of the others."""
    for line in _jsonl_rows(path):
        try:
            first = parse_member(line)
        except SampleError:
            continue
        if isinstance(first, dict):
            return first
    return {}


def _csv_columns(path: Path, kind: str) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return list(csv.DictReader(file, dialect=_DIALECTS[kind]).fieldnames or [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataConfigError(f"{path}, line 1: {error}") from error


def _csv_rows(path: Path, kind: str) -> Iterator[dict[Any, Any] | SampleError]:
    csv.field_size_limit(MOST_LINE_BYTES)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, dialect=_DIALECTS[kind])
        try:
            for record in reader:
                if None in record or None in record.values():
                    yield SampleError("the row has not as many fields as the first line has names")
                else:
                    yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataConfigError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[bytes]:
    try:
        yield from (line for line in read_lines(path, most_bytes=MOST_LINE_BYTES) if line.strip())
    except UntrustedError as error:
        raise DataConfigError(f"{path}: {error}") from error
