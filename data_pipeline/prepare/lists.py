"""Read CSV, TSV, JSONL and JSON arrays as a source: one sample per row, with images in files or in the row itself."""

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
from data_pipeline.io.json_array import read_array
from data_pipeline.io.json_member import parse_member
from data_pipeline.io.untrusted import UntrustedError, read_lines
from data_pipeline.prepare.column_names import (
    FILE_NAME,
    METADATA,
    MOST_LINE_BYTES,
    describe_guesses,
    guess_path_column,
    guess_text_column,
    renamed_columns,
)
from data_pipeline.prepare.media_files import FileLoader
from data_pipeline.prepare.records import (
    ANSWERS,
    CAPTION,
    CAPTIONS,
    CLIPS,
    PATH,
    SPOKEN,
    FieldNames,
    members_from_record,
)
from data_pipeline.prepare.rows import Members, SourceRow, chunks_of, read_rows
from data_pipeline.shards.interleaved import IMAGE_BASE64, IMAGES, PARTS, TEXT_LIST, TEXTS

KEY_DIGITS = 9
_DIALECTS = {"csv": "excel", "tsv": "excel-tab"}
_LIKELY_IMAGES = ("image", "images", "image_path", "img", "file_name", "filename", "filepath", "file", "url")
"""Names that other tools use for the column of the image's path."""


class ListSource:
    """Rows with ``path`` or ``image_base64``, and ``caption``, ``captions`` or ``parts``. Other columns are kept.

    The key is the row's number.

    Args:
        path: The list.
        kind: ``csv``, ``tsv``, ``jsonl`` or ``json``.
        names: Columns to rename or drop.
        load: Loads the images that the rows name.
        lenient: Leave unreadable images out of documents instead of failing the document.

    Raises:
        DataConfigError: the list cannot be read, or no column is an image or a text.
    """

    def __init__(self, path: Path, kind: str, names: FieldNames, load: FileLoader, lenient: bool = False) -> None:
        self._path, self._kind = path, kind
        is_table = kind in _DIALECTS
        first = _first_record(self._records())
        if is_table:
            first = dict.fromkeys(_csv_columns(path, kind), "") | first
        found = list(first)
        likely = [name for name in found if name.lower() in _LIKELY_IMAGES and _is_file(first[name], load)]
        names = guess_path_column(names, found, [FILE_NAME] if path.name in METADATA else likely)
        could_be_text = {
            name: isinstance(value, list) for name, value in first.items() if isinstance(value, str | list)
        }
        names = guess_text_column(names, found, could_be_text, str(path))
        if is_table:
            names.check(found, str(path))
        check_columns(path, renamed_columns(names, found), is_table)
        self.reader = ListReader(load, names, lenient)
        self._count = sum(1 for _ in self._records())
        self.description = f"a {kind} list of {self._count:,} rows{describe_guesses(names)}"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        return chunks_of(SourceRow(n, f"{n:0{KEY_DIGITS}d}", record) for n, record in enumerate(self._records(), 1))

    def count(self) -> int:
        return self._count

    def digest(self) -> str:
        return hashlib.sha256(f"{self.reader!r} {sha256_of(self._path)}".encode()).hexdigest()

    def images(self) -> Iterator[Path]:
        """Yield the path of every image file that a readable row names, whether or not the file exists."""
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
        return _csv_rows(self._path, self._kind) if self._kind in _DIALECTS else _json_rows(self._path, self._kind)


@dataclass(frozen=True)
class ListReader:
    """Reads records: the bytes of a JSON line, or an already parsed record."""

    load: FileLoader
    names: FieldNames
    lenient: bool

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        return read_rows(rows, self.read_record)

    def read_record(self, record: bytes | Mapping[Any, Any]) -> Members:
        """Return the members of one record; raise ``SampleError`` if it is unusable."""
        return members_from_record(self.fields_of(record), self.load, self.lenient)

    def fields_of(self, record: bytes | Mapping[Any, Any] | SampleError) -> dict[str, Any]:
        """Return the fields of one record under their new names; raise ``SampleError`` if it cannot be parsed."""
        if isinstance(record, SampleError):
            raise record
        parsed = parse_member(record) if isinstance(record, bytes) else record
        if not isinstance(parsed, Mapping):
            raise SampleError(f"the line holds a {type(parsed).__name__}, expected an object")
        return self.names.apply(parsed)


def check_columns(path: Path, columns: Sequence[str], is_table: bool) -> None:
    """Check that an image column is not overlooked, which would store every row as text only.

    Args:
        path: The file, for messages.
        columns: Column names after renaming.
        is_table: Whether the columns are complete, as in CSV or Parquet; a line of JSONL may have other fields.

    Raises:
        DataConfigError: a column's name suggests an image but no column has the image's name, or a table has neither
            image nor text.
    """
    if {PATH, IMAGE_BASE64, PARTS, TEXTS, TEXT_LIST, *CLIPS} & set(columns):
        return
    known = {"image", IMAGES} if SPOKEN & set(columns) else set()  # A dialogue's images have these names too.
    likely = [name for name in columns if name.lower() in _LIKELY_IMAGES and name not in known]
    if likely:
        raise DataConfigError(
            f"{path}: has no column {PATH}, but {likely[0]}; if that is the image, use --column {PATH}={likely[0]}, "
            f"else --drop {likely[0]}; it has {', '.join(columns)}"
        )
    if is_table and not ({CAPTION, CAPTIONS} | SPOKEN | ANSWERS) & set(columns):
        raise DataConfigError(
            f"{path}: needs a column {PATH} or {CAPTION}, found {', '.join(columns)}; "
            f"choose one, for example --column {CAPTION}={columns[-1] if columns else 'text'}"
        )


def _first_record(records: Iterator[Any]) -> dict[str, Any]:
    """Return the first record that is an object, or an empty dict. Other records fail later, as rows."""
    for record in records:
        try:
            first = parse_member(record) if isinstance(record, bytes) else record
        except SampleError:
            continue
        if isinstance(first, dict):
            return first
    return {}


def _is_file(reference: Any, load: FileLoader) -> bool:
    """Whether a value names an existing file in the folder of the images."""
    try:
        return isinstance(reference, str) and load.path_of(reference).is_file()
    except (SampleError, ValueError):
        return False


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
                    yield SampleError("the number of fields differs from the number of columns in the first line")
                else:
                    yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataConfigError(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path, kind: str) -> Iterator[bytes]:
    """Yield the JSON text of each row: the lines of a JSONL, or the elements of an array."""
    try:
        if kind == "json":
            yield from read_array(path, most_bytes=MOST_LINE_BYTES)
        else:
            yield from (line for line in read_lines(path, most_bytes=MOST_LINE_BYTES) if line.strip())
    except UntrustedError as error:
        raise DataConfigError(
            f"{path}: {error}; --from jsonl reads one object per line, --from json one array"
        ) from error
