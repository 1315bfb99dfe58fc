"""Where ingest finds its samples: which kind of source a path is, and folders, CSV and JSONL themselves.

Parquet is in ``parquet``, tars of other tools in ``tars``.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.shards.files import sha256_of
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.records import CAPTION, PATH, FieldNames, FileLoader, checked, members_of, read_file
from data_pipeline.shards.rows import Members, Row, Source, read_each, spans_of
from data_pipeline.shards.tar_members import split_name
from data_pipeline.shards.texts import parse_json

KEY_DIGITS = 9
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class SourceKind(str, Enum):
    """What a source is."""

    AUTO = "auto"
    """Told by its name and what lies in it."""
    FOLDER = "folder"
    """Images with same-stem .txt or .json."""
    CSV = "csv"
    """Columns path and caption."""
    JSONL = "jsonl"
    """An object a line: path, caption, captions, parts, or a document of OBELICS or MMC4."""
    PARQUET = "parquet"
    """The same in Parquet, images inside or beside."""
    WEBDATASET = "webdataset"
    """Tars, their members as they are."""
    IMG2DATASET = "img2dataset"
    """Tars of img2dataset (LAION, DataComp): .jpg, .txt and a .json with a status."""
    ENERGON = "energon"
    """A folder with .nv-meta."""
    OBELICS = "obelics"
    """Tars with numbered images and a .json with images and texts."""
    MMC4 = "mmc4"
    """Tars with a .json with text_list and image_info, images beside or inside it."""


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
        kind: What it is.
        names: New names for columns, and columns to leave out; for lists and Parquet.
        split: Which split of an Energon folder.
    """

    kind: SourceKind = SourceKind.AUTO
    names: FieldNames = field(default_factory=FieldNames)
    split: str = "train"


def open_source(path: str | Path, options: SourceOptions | None = None) -> Source:
    """The source at ``path``.

    Raises:
        DataConfigError: nothing is there, it is of another kind than asked for, or an option does not apply to it.
    """
    path, options = Path(path), options or SourceOptions()
    if not path.is_dir() and not path.is_file():
        raise DataConfigError(f"{path}: no such file or folder")
    kind = _kind_of(path) if options.kind is SourceKind.AUTO else options.kind
    if options.names != FieldNames() and kind not in (SourceKind.CSV, SourceKind.JSONL, SourceKind.PARQUET):
        raise DataConfigError(
            f"{path}: columns can be renamed or dropped in csv, jsonl and parquet, this is {kind.value}"
        )
    if kind is SourceKind.FOLDER:
        return FolderSource(path)
    if kind in (SourceKind.CSV, SourceKind.JSONL):
        return ListSource(path, kind, options.names)
    if kind is SourceKind.PARQUET:
        from data_pipeline.shards.parquet import ParquetSource  # pyarrow is an extra.

        return ParquetSource(path, options.names)
    from data_pipeline.shards.tars import open_tars

    return open_tars(path, kind, guess=options.kind is SourceKind.AUTO, split=options.split)


def _kind_of(path: Path) -> SourceKind:
    """Told from names alone; which layout tars have is told later, from the first sample."""
    if path.is_file():
        suffix = path.suffix.lower()
        by_suffix = {".csv": SourceKind.CSV, ".jsonl": SourceKind.JSONL, ".ndjson": SourceKind.JSONL}
        if suffix in by_suffix:
            return by_suffix[suffix]
        if suffix == ".parquet":
            return SourceKind.PARQUET
        if is_tar(path.name):
            return SourceKind.WEBDATASET
        raise DataConfigError(
            f"{path}: ingest takes a folder, a .csv, .jsonl, .parquet or .tar; name its kind with --from"
        )
    if (path / ".nv-meta").is_dir():
        return SourceKind.ENERGON
    names = [name for _, _, files in walk_folder(path) for name in files]
    # img2dataset leaves Parquet files with its statistics beside its tars: tars come first.
    if any(is_tar(name) for name in names):
        return SourceKind.WEBDATASET
    return SourceKind.PARQUET if any(name.lower().endswith(".parquet") for name in names) else SourceKind.FOLDER


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar, compressed or not."""
    return name.lower().endswith(_TARS)


def walk_folder(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(relative path with a slash at its end or "", folder, sorted file names) of a folder and those below, in order.

    Hidden files and folders are left alone, links to folders are not followed.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, folder).replace(os.sep, "/")
        shown = sorted(name for name in files if not name.startswith("."))
        yield "" if relative == "." else f"{relative}/", Path(place), shown


class FolderSource:
    """Images and same-stem ``.txt`` or ``.json`` files, below a folder; the stem is the key, the order is by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.reader = _FileReader()
        digest, self._count = hashlib.sha256(), 0
        for row in self._rows():
            self._count += 1
            sizes = [(name.name, name.stat().st_size if name.exists() else -1) for _, name in row.reference]
            digest.update(f"{row.key!a} {sizes!a}\n".encode())
        if not self._count:
            raise DataConfigError(f"{folder}: no files to ingest")
        self._digest = digest.hexdigest()
        self.description = f"a folder of {self._count:,} samples (files with one stem are one sample)"

    def spans(self) -> Iterator[Sequence[Row]]:
        return spans_of(self._rows())

    def count(self) -> int:
        return self._count

    def digest(self) -> str:
        return self._digest

    def _rows(self) -> Iterator[Row]:
        number = 0
        for place, folder, names in walk_folder(self._folder):
            samples: dict[str, dict[str, Path]] = {}
            for name in names:
                key, ext = split_name(name) or (name, "")
                files = samples.setdefault(key, {})
                if ext in files:
                    raise DataConfigError(
                        f"{folder / name} and {files[ext]} would be one member of one sample; rename one"
                    )
                files[ext] = folder / name
            for key, files in sorted(samples.items()):
                number += 1
                yield Row(number, place + key, tuple(sorted(files.items())))


@dataclass(frozen=True)
class _FileReader:
    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        return read_each(rows, self._read)

    def _read(self, files: tuple[tuple[str, Path], ...]) -> Members:
        for ext, path in files:
            if not is_image(ext) and ext not in ("txt", "json"):
                raise SampleError(f"{path}: neither an image (.jpg .jpeg .png .webp) nor .txt or .json")
        return checked({ext: read_file(path) for ext, path in files})


class ListSource:
    """A CSV or JSONL file: columns ``path`` and ``caption`` (or ``captions``, ``parts``), any others are kept.

    Paths are relative to the list. The number of the row is the key.
    """

    def __init__(self, path: Path, kind: SourceKind, names: FieldNames) -> None:
        self._path, self._list = path, _csv_rows if kind is SourceKind.CSV else _jsonl_rows
        if kind is SourceKind.CSV:
            columns = names.check(_csv_columns(path), str(path))
            if PATH not in columns and CAPTION not in columns:
                raise DataConfigError(
                    f"{path}: needs a column {PATH} or {CAPTION} in its first line, found {columns}; "
                    f"say which one it is, for example --column {CAPTION}={columns[-1] if columns else 'text'}"
                )
        self.reader = ListReader(FileLoader(path.parent), names)
        self._count = sum(1 for _ in self._list(path))
        self.description = f"a {kind.value} list of {self._count:,} rows"

    def spans(self) -> Iterator[Sequence[Row]]:
        return spans_of(Row(n, f"{n:0{KEY_DIGITS}d}", record) for n, record in enumerate(self._list(self._path), 1))

    def count(self) -> int:
        return self._count

    def digest(self) -> str:
        return sha256_of(self._path)


@dataclass(frozen=True)
class ListReader:
    """Reads records: a line of JSON, or a record that is parsed already."""

    load: FileLoader
    names: FieldNames

    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        return read_each(rows, self.read_record)

    def read_record(self, record: bytes | Mapping[Any, Any]) -> Members:
        """The members of one record."""
        parsed = parse_json(record) if isinstance(record, bytes) else record
        if not isinstance(parsed, Mapping):
            raise SampleError(f"the line holds a {type(parsed).__name__}, expected an object")
        return members_of(self.names.apply(parsed), self.load)


def _csv_columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return list(csv.DictReader(file).fieldnames or [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataConfigError(f"{path}, line 1: {error}") from error


def _csv_rows(path: Path) -> Iterator[dict[Any, Any] | SampleError]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                if None in record or None in record.values():
                    yield SampleError("the row has not as many fields as the first line has names")
                else:
                    yield record
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataConfigError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.strip())
