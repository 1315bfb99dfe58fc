"""Find the text and image columns of a list or a Parquet file that uses Hugging Face's column names.

    metadata.jsonl, metadata.csv    file_name and text                    (``datasets`` imagefolder)
    Parquet                         image {bytes, path}, text, label      (``Dataset.to_parquet``, the Hub)

The source's description names each guessed column. Not for: reading rows (``lists``, ``parquet``).
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
from data_pipeline.shards.interleaved import IMAGE_BASE64, PARTS, TEXT_LIST, TEXTS

FILE_NAME = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TEXTS = ("text", "txt", "alt_text", "description")
MOST_LINE_BYTES = 1 << 28
"""Longest line of a list. Python's default limit of 128 KiB per CSV field is too small for an image in base64."""
_IMAGES = frozenset({PATH, IMAGE_BASE64, PARTS, TEXTS, TEXT_LIST}) | SPOKEN
_OURS = frozenset({CAPTION, CAPTIONS, PARTS, TEXTS, TEXT_LIST}) | SPOKEN


def metadata_file(folder: Path) -> Path | None:
    """Return the metadata list of a ``datasets`` imagefolder; None if the folder has none.

    Raises:
        DataConfigError: the folder holds several (one per split), or one cannot be read.
    """
    listed = [subfolder / name for _, subfolder, names in walk_folder(folder) for name in names if name in METADATA]
    found = [path for path in listed if path.suffix == ".parquet" or _names_files(path)]
    if len(found) > 1:
        raise DataConfigError(
            f"{folder}: {len(found)} lists of images ({', '.join(str(path.relative_to(folder)) for path in found[:4])}"
            "): ingest one split at a time, by the path of its list or of its folder"
        )
    return found[0] if found else None


def _names_files(path: Path) -> bool:
    """Whether ``file_name`` is a column of a CSV or a field of a JSONL's first non-empty line."""
    number = 0
    try:
        lines = enumerate(read_lines(path, most_bytes=MOST_LINE_BYTES), 1)
        number, line = next(((at, line) for at, line in lines if line.strip()), (0, b""))
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


def guess_text_column(
    names: FieldNames, columns: Sequence[str], texts: Mapping[str, bool], location: str
) -> FieldNames:
    """Return ``names``, with the text column renamed to ``caption`` or ``captions``.

    A source that has a text field already (``has_text_column``) keeps its names.

    Args:
        names: The user's renames and drops.
        columns: Column names of the source.
        texts: Columns that can be text: name to whether the column holds lists of texts.
        location: Beginning of an error message.

    Raises:
        DataConfigError: several columns may be the text.
    """
    renamed = renamed_columns(names, columns)
    if _OURS & set(renamed):
        return names
    found = [name for name in texts if name.lower() in _TEXTS and name in renamed]
    if len(found) > 1:
        raise DataConfigError(
            f"{location}: the columns {', '.join(found)} may all be the text; choose one with --column {CAPTION}=NAME"
        )
    return names if not found else _with_guess(names, CAPTIONS if texts[found[0]] else CAPTION, found[0])


def guess_path_column(names: FieldNames, columns: Sequence[str], candidates: Sequence[str]) -> FieldNames:
    """Return ``names``, with the only one of ``candidates`` renamed to ``path`` if no column holds images by its name.

    The images of a dialogue are found under their usual names (``records``), so its columns keep theirs.
    """
    renamed = renamed_columns(names, columns)
    found = [name for name in candidates if name in renamed]
    if len(found) != 1 or _IMAGES & set(renamed):
        return names
    return _with_guess(names, PATH, found[0])


def has_text_column(names: FieldNames, columns: Sequence[str]) -> bool:
    """Whether a column is, after renaming, one of the text fields (caption, parts, a dialogue, ...)."""
    return not _OURS.isdisjoint(renamed_columns(names, columns))


def renamed_columns(names: FieldNames, columns: Sequence[str]) -> list[str]:
    """Return the new names of the columns that are not dropped. Renames of absent columns are ignored."""
    renamed = {old: new for new, old in (*names.guessed, *names.renamed)}
    return [renamed.get(name, name) for name in columns if name not in names.dropped]


def _with_guess(names: FieldNames, new: str, old: str) -> FieldNames:
    return replace(names, guessed=(*names.guessed, (new, old)))


def describe_guesses(names: FieldNames) -> str:
    """Return the guessed renames as text for a source's description, for example ``, column text as caption``."""
    return "".join(f", column {old} as {new}" for new, old in names.guessed)


def hf_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return the features that ``datasets`` stores in a Parquet schema; an empty dict if there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return dict(features)
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def columns_of(features: Mapping[str, Any], kind: str) -> list[str]:
    """Return the columns that ``datasets`` decodes as ``kind``: ``Image``, ``Video`` or ``Audio``."""
    return [name for name, feature in features.items() if _type_of(feature) == kind]


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the class names of each ``ClassLabel`` column."""
    found: dict[str, tuple[str, ...]] = {}
    for name, feature in features.items():
        names = feature.get("names") if _type_of(feature) == "ClassLabel" else None
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = tuple(names)
    return found


def _type_of(feature: Any) -> Any:
    return feature.get("_type") if isinstance(feature, dict) else None
