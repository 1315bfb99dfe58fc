"""Which columns of a list or a Parquet file are text and image where they have the names of Hugging Face, not ours.

    metadata.jsonl, metadata.csv    file_name and text                    (``datasets`` imagefolder)
    Parquet                         image {bytes, path}, text, label      (``Dataset.to_parquet``, the Hub)

What is taken for what is told in the source's description. Not for: reading rows (``lists``, ``parquet``).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataConfigError
from data_pipeline.io.untrusted import UntrustedError, parse_json, read_lines
from data_pipeline.prepare.folders import walk_folder
from data_pipeline.prepare.records import CAPTION, CAPTIONS, PATH, SPOKEN, FieldNames
from data_pipeline.shards.interleaved import PARTS, TEXT_LIST, TEXTS

FILE_NAME = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXTS = ("text", "txt", "alt_text", "description")
MOST_LINE_BYTES = 1 << 28
"""Of a list; Python's own limit of 128 KiB for a field of a CSV is less than an image in base64."""
_OURS = frozenset({CAPTION, CAPTIONS, PARTS, TEXTS, TEXT_LIST}) | SPOKEN


def metadata_file(folder: Path) -> Path | None:
    """The list of an imagefolder of ``datasets``; None if it has none.

    Raises:
        DataConfigError: there are several, one for each split; or one cannot be read.
    """
    listed = [place / name for _, place, names in walk_folder(folder) for name in names if name in METADATA]
    found = [path for path in listed if path.suffix == ".parquet" or _names_files(path)]
    if len(found) > 1:
        raise DataConfigError(
            f"{folder}: {len(found)} lists of images ({', '.join(str(path.relative_to(folder)) for path in found[:4])}"
            "): ingest one split at a time, by the path of its list or of its folder"
        )
    return found[0] if found else None


def _names_files(path: Path) -> bool:
    """Whether the columns of a list, or the fields of its first line, include the name of a file."""
    number = 0
    try:
        lines = enumerate(read_lines(path, most_bytes=MOST_LINE_BYTES), 1)
        number, line = next(((place, line) for place, line in lines if line.strip()), (0, b""))
        if not line:
            raise UntrustedError("it is empty")
        if path.suffix == ".csv":
            return FILE_NAME in next(csv.reader([line.decode("utf-8-sig")]))
        fields = parse_json(line)
        if not isinstance(fields, dict):
            raise UntrustedError(f"the line holds a {type(fields).__name__}, expected an object")
        return FILE_NAME in fields
    except (UntrustedError, UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataConfigError(
            f"{path}, line {max(number, 1)}: {error}; a file of this name lists the images of its folder: repair it, "
            "or move it out of the folder"
        ) from error


def with_text(names: FieldNames, columns: Sequence[str], texts: Mapping[str, bool], place: str) -> FieldNames:
    """``names``, and the column that must be the text as ``caption`` or ``captions`` where no column is called so.

    Args:
        names: What the user said of the columns.
        columns: Of the source.
        texts: Those that can be text: name to whether it holds lists of texts.
        place: For messages.

    Raises:
        DataConfigError: several columns may be the text.
    """
    shown = new_names(names, columns)
    if _OURS & set(shown):
        return names
    found = [name for name in texts if name.lower() in _TEXTS and name in shown]
    if len(found) > 1:
        raise DataConfigError(
            f"{place}: the columns {', '.join(found)} may all be the text; say which with --column {CAPTION}=NAME"
        )
    return names if not found else _guessed(names, CAPTIONS if texts[found[0]] else CAPTION, found[0])


def with_file_name(names: FieldNames, columns: Sequence[str]) -> FieldNames:
    """``names``, and ``file_name`` as the path of the image where no column is called ``path``."""
    shown = new_names(names, columns)
    return _guessed(names, PATH, FILE_NAME) if FILE_NAME in shown and PATH not in shown else names


def has_text(names: FieldNames, columns: Sequence[str]) -> bool:
    """Whether a column is text by its name."""
    return not _OURS.isdisjoint(new_names(names, columns))


def new_names(names: FieldNames, columns: Sequence[str]) -> list[str]:
    """The columns under their new names, whether or not all that are to be renamed exist."""
    renamed = {old: new for new, old in (*names.guessed, *names.renamed)}
    return [renamed.get(name, name) for name in columns if name not in names.dropped]


def _guessed(names: FieldNames, new: str, old: str) -> FieldNames:
    return replace(names, guessed=(*names.guessed, (new, old)))


def told(names: FieldNames) -> str:
    """What was taken for what, for the description of a source."""
    return "".join(f", column {old} as {new}" for new, old in names.guessed)


def hf_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features that ``datasets`` notes in the schema of a Parquet file; empty without them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return dict(features)
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def image_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns that ``datasets`` decodes as images."""
    return [name for name, feature in features.items() if _type_of(feature) == "Image"]


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of the classes of each column of class numbers."""
    found: dict[str, tuple[str, ...]] = {}
    for name, feature in features.items():
        names = feature.get("names") if _type_of(feature) == "ClassLabel" else None
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = tuple(names)
    return found


def _type_of(feature: Any) -> Any:
    return feature.get("_type") if isinstance(feature, dict) else None
