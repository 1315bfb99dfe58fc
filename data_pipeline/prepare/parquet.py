"""Read Parquet and Arrow files as a source.

Images are bytes, Hugging Face's struct of bytes and path, or paths of files.

A process reads whole groups of rows (``table_files``). Needs pyarrow (extra ``parquet``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.prepare.column_names import (
    class_names,
    columns_of,
    describe_guesses,
    guess_text_column,
    has_text_column,
    hf_features,
)
from data_pipeline.prepare.lists import KEY_DIGITS, check_columns
from data_pipeline.prepare.media_files import FileLoader
from data_pipeline.prepare.records import CAPTION, CLIPS, PATH, FieldNames, members_from_record
from data_pipeline.prepare.rows import Members, SourceRow
from data_pipeline.prepare.table_files import open_table, pa, table_files
from data_pipeline.shards.interleaved import IMAGE_INFO, TEXT_LIST, TEXTS

_IMAGE_COLUMNS = ("image", "images", "jpg", "jpeg", "png", "webp")


class TableSource:
    """One Parquet or Arrow file, or a folder of files; the columns of the first file are read from all.

    The key is the row's number, counted over all files.

    Args:
        path: The file or the folder.
        names: Columns to rename or drop.
        images: Folder of the images that the rows name; None means the folder of the file.
        lenient: Leave unreadable images out of documents instead of failing the document.

    Raises:
        DataConfigError: a file cannot be read, or the image or text column is missing or ambiguous.
    """

    def __init__(self, path: Path, names: FieldNames, images: Path | None = None, lenient: bool = False) -> None:
        self._root = path
        self._files = table_files(path)
        tables = [open_table(file) for file in self._files]
        self._groups = [table.group_rows for table in tables]
        schema = tables[0].schema
        features = hf_features(schema.metadata)
        names = _with_clips(_with_image(names, schema, columns_of(features, "Image"), str(self._files[0])), features)
        texts = {field.name: _is_list(field.type) for field in schema if _holds_text(field.type)}
        names = guess_text_column(names, schema.names, texts, str(self._files[0]))
        classes = {name: classes for name, classes in class_names(features).items() if name in schema.names}
        labels = [name for name in classes if name not in names.dropped]
        caption_of = labels[0] if len(labels) == 1 and not has_text_column(names, schema.names) else None
        columns = names.check(schema.names, str(self._files[0]))
        check_columns(self._files[0], [*columns, CAPTION] if caption_of else columns, is_table=True)
        kept = tuple(name for name in schema.names if name not in names.dropped)
        self.reader = TableReader(tuple(self._files), kept, names, images, lenient, classes, caption_of)
        image = next((old for new, old in names.renamed if new == PATH), PATH)
        where = f"images in column {image}" if PATH in columns else "documents or texts"
        guesses = describe_guesses(names)
        if caption_of:
            guesses += f", the name of the class in column {caption_of} as {CAPTION}"
        kind = "Arrow" if self._files[0].suffix.lower() == ".arrow" else "Parquet"
        self.description = f"{len(self._files)} {kind} files of {self.count():,} rows, {where}{guesses}"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        number = 0
        for file_number, groups in enumerate(self._groups):
            for group, num_rows in enumerate(groups):
                yield [
                    SourceRow(n, f"{n:0{KEY_DIGITS}d}", (file_number, group))
                    for n in range(number + 1, number + num_rows + 1)
                ]
                number += num_rows

    def count(self) -> int:
        return sum(map(sum, self._groups))

    def digest(self) -> str:
        reader = self.reader
        options = (reader.names, reader.images, reader.lenient, reader.classes, reader.caption_of)
        digest = hashlib.sha256(repr(options).encode())
        for file in self._files:
            name = os.path.relpath(file, self._root)
            digest.update(f"{name!a} ".encode() + open_table(file).digest())
        return digest.hexdigest()


def _with_image(names: FieldNames, schema: pa.Schema, known: Sequence[str], location: str) -> FieldNames:
    """Return ``names``, with the only image column renamed to ``path`` unless the user renamed one.

    A schema with ``texts``, ``text_list`` or ``image_info`` holds documents, whose columns keep their names.

    Args:
        names: The user's renames and drops.
        schema: Schema of the first file.
        known: Columns that Hugging Face's metadata declares as images.
        location: Beginning of an error message.

    Raises:
        DataConfigError: several columns may be the image.
    """
    taken = {PATH, *names.dropped, *(old for _, old in names.renamed)}
    if PATH in (new for new, _ in names.renamed) or {TEXTS, TEXT_LIST, IMAGE_INFO} & set(schema.names):
        return names
    likely = [*_IMAGE_COLUMNS, *(name for name in known if name not in _IMAGE_COLUMNS)]
    found = [name for name in likely if name in schema.names and name not in taken]
    found = [name for name in found if _holds_images(schema.field(name).type)]
    if PATH in schema.names and PATH not in names.dropped:
        found.append(PATH)
    if len(found) > 1:
        raise DataConfigError(
            f"{location}: the columns {', '.join(found)} may all be the image; "
            f"choose one with --column {PATH}=NAME, and --drop the others"
        )
    return names if found in ([], [PATH]) else FieldNames((*names.renamed, (PATH, found[0])), names.dropped)


def _with_clips(names: FieldNames, features: Mapping[str, Any]) -> FieldNames:
    """Return ``names``, with the only declared column of videos, and of sounds, renamed to ``video`` and ``audio``."""
    renamed = names.renamed
    for kind in ("video", "audio"):
        declared = columns_of(features, kind.capitalize())
        taken = {*names.dropped, *(old for _, old in renamed)} | {new for new, _ in renamed}
        if len(declared) == 1 and not {*declared, kind, f"{kind}s"} & taken and declared[0] not in CLIPS:
            renamed = (*renamed, (kind, declared[0]))
    return FieldNames(renamed, names.dropped, names.guessed)


def _holds_text(kind: pa.DataType) -> bool:
    if _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _holds_images(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass
class TableReader:
    """Reads the rows of one group and keeps the last file open. Every process has its own copy."""

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    names: FieldNames
    images: Path | None
    lenient: bool
    classes: dict[str, tuple[str, ...]]
    """Class names of each column of class numbers; the names replace the numbers."""
    caption_of: str | None
    """The class column whose names also become the caption; None for none."""
    _open_number: int = -1
    _file: Any = None

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        """Yield the members of the last ``len(rows)`` rows of a group; a resumed ingest omits its first rows."""
        file_number, group = rows[0].reference
        load, given = FileLoader(self.images or self.files[file_number].parent, holds_urls=self.images is not None), 0
        try:
            if file_number != self._open_number:
                self._open_number, self._file = file_number, open_table(self.files[file_number])
            skip = self._file.group_rows[group] - len(rows)
            for batch in self._file.batches(group, self.columns):
                kept = batch.slice(min(skip, len(batch)))
                skip -= len(batch) - len(kept)
                for record in kept.to_pylist():
                    yield self._members(record, load)
                    given += 1
        except (pa.ArrowException, DataConfigError, OSError, ValueError) as error:
            damage = SampleError(f"{self.files[file_number]}, row group {group}: cannot be read: {error}")
            for _ in rows[given:]:
                yield damage

    def _members(self, record: dict[str, Any], load: FileLoader) -> Members | SampleError:
        try:
            for name, classes in self.classes.items():
                if name in record:
                    record[name] = _class_name(record[name], classes, name)
            if self.caption_of is not None:
                record[CAPTION] = record[self.caption_of]
            return members_from_record(self.names.apply(record), load, self.lenient)
        except SampleError as error:
            return error


def _class_name(value: Any, names: Sequence[str], column: str) -> str | None:
    """Return the name of a class number; None for None and for -1, which ``datasets`` writes for an unknown class.

    Raises:
        SampleError: the number has no name.
    """
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise SampleError(f"column {column} holds the class {value!r:.80}, but only {len(names)} classes have names")
    return names[value]
