"""Open a path as a source of samples for ingest, and detect its format.

A new format needs a file with its source, a member of ``choices.SourceKind`` and an entry in ``FORMATS``. The existing
sources are in ``folders``, ``lists`` (CSV, TSV, JSONL, JSON), ``parquet`` (also Arrow) and ``tars``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import DataConfigError
from data_pipeline.prepare.choices import SourceKind
from data_pipeline.prepare.column_names import metadata_file
from data_pipeline.prepare.folders import FolderSource, walk_folder
from data_pipeline.prepare.lists import ListSource
from data_pipeline.prepare.media_files import FileLoader
from data_pipeline.prepare.records import FieldNames
from data_pipeline.prepare.rows import RowSource
from data_pipeline.shards.image_header import is_image
from data_pipeline.storage.location import local_path

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DOCUMENTS = (SourceKind.OBELICS, SourceKind.MMC4, SourceKind.IMG2DATASET)


@dataclass(frozen=True)
class SourceOptions:
    """Options for opening a source.

    Attributes:
        kind: Format of the source.
        names: Columns to rename or drop; for lists and Parquet only.
        split: Split of an Energon folder to read.
        images: Folder of the images that a list or Parquet names; None means the folder of the list.
        drop_images: Leave unreadable images out of a document (``parts``) instead of failing the whole document.
    """

    kind: SourceKind = SourceKind.AUTO
    names: FieldNames = field(default_factory=FieldNames)
    split: str = "train"
    images: Path | None = None
    drop_images: bool = False


@dataclass(frozen=True)
class SourceFormat:
    """Detection and opening of sources of one kind.

    Attributes:
        open: Opens the source, given its path, kind and options.
        suffixes: Lower-case suffixes of files that have this kind by default.
        is_list: Whether the source has columns and names image files, so that the options ``names``, ``images`` and
            ``drop_images`` apply.
    """

    open: Callable[[Path, SourceKind, SourceOptions], RowSource]
    suffixes: tuple[str, ...] = ()
    is_list: bool = False


def _open_folder(path: Path, kind: SourceKind, options: SourceOptions) -> RowSource:
    return FolderSource(path, None if options.kind is SourceKind.AUTO else kind is SourceKind.CLASSES)


def _open_list(path: Path, kind: SourceKind, options: SourceOptions) -> RowSource:
    images = options.images
    load = FileLoader(path.parent) if images is None else FileLoader(images, holds_urls=True)
    return ListSource(path, kind.value, options.names, load, options.drop_images)


def _open_table(path: Path, kind: SourceKind, options: SourceOptions) -> RowSource:
    from data_pipeline.prepare.parquet import TableSource  # Needs pyarrow, an optional dependency.

    return TableSource(path, options.names, options.images, options.drop_images)


def _open_tars(path: Path, kind: SourceKind, options: SourceOptions) -> RowSource:
    from data_pipeline.prepare.tars import open_tars

    return open_tars(path, kind, guess=options.kind is SourceKind.AUTO, split=options.split)


FORMATS = {
    SourceKind.FOLDER: SourceFormat(_open_folder),
    SourceKind.CLASSES: SourceFormat(_open_folder),
    SourceKind.CSV: SourceFormat(_open_list, (".csv",), is_list=True),
    SourceKind.TSV: SourceFormat(_open_list, (".tsv",), is_list=True),
    SourceKind.JSONL: SourceFormat(_open_list, (".jsonl", ".ndjson"), is_list=True),
    SourceKind.JSON: SourceFormat(_open_list, (".json",), is_list=True),
    SourceKind.PARQUET: SourceFormat(_open_table, (".parquet",), is_list=True),
    SourceKind.ARROW: SourceFormat(_open_table, (".arrow",), is_list=True),
    SourceKind.WEBDATASET: SourceFormat(_open_tars),
    SourceKind.IMG2DATASET: SourceFormat(_open_tars),
    SourceKind.ENERGON: SourceFormat(_open_tars),
    SourceKind.OBELICS: SourceFormat(_open_tars),
    SourceKind.MMC4: SourceFormat(_open_tars),
}
"""All kinds except ``auto``."""


def open_source(path: str | Path, options: SourceOptions | None = None) -> RowSource:
    """Open the source at ``path``, a local file or folder.

    Raises:
        DataConfigError: the path does not exist, has another kind than ``options.kind``, or an option does not apply
            to its kind.
    """
    path, options = local_path(path, "ingest reads"), options or SourceOptions()
    if not path.is_dir() and not path.is_file():
        raise DataConfigError(f"{path}: no such file or folder")
    kind = options.kind
    if kind is SourceKind.AUTO and path.is_dir() and (metadata := _imagefolder(path)) is not None:
        path = metadata
    if kind is SourceKind.AUTO or (kind in _DOCUMENTS and FORMATS[_kind_of(path)].is_list):
        kind = _kind_of(path)
    if not FORMATS[kind].is_list:
        _check_no_list_options(path, kind, options)
    return FORMATS[kind].open(path, kind, options)


def warnings(path: str | Path, source: RowSource) -> Iterator[str]:
    """Yield a warning if ``path`` is a folder that is read by its list and the list does not name all of its images."""
    folder = local_path(path, "ingest reads")
    if not folder.is_dir() or not isinstance(source, ListSource):
        return
    named = set(source.images())
    found = (parent / name for _, parent, names in walk_folder(folder) for name in names if is_image(name.lower()))
    unnamed = [image for image in map(os.path.normpath, found) if Path(image) not in named]
    if unnamed:
        yield (
            f"{len(unnamed):,} images of {folder} are left out, since no row of its list names them; the first: "
            f"{unnamed[0]}"
        )


def _check_no_list_options(path: Path, kind: SourceKind, options: SourceOptions) -> None:
    """Raise DataConfigError if an option is set that applies to lists and Parquet only."""
    if options.names != FieldNames():
        raise DataConfigError(
            f"{path}: columns can be renamed or dropped in csv, tsv, jsonl, json, parquet and arrow, this is "
            f"{kind.value}"
        )
    if options.images is not None or options.drop_images:
        raise DataConfigError(
            f"{path}: --images and --drop-images are for lists and Parquet that name files, this is {kind.value}"
        )


def _kind_of(path: Path) -> SourceKind:
    """Return the kind that file names suggest. The layout of tars is guessed later, from their first sample."""
    if path.is_file():
        for kind, known in FORMATS.items():
            if path.suffix.lower() in known.suffixes:
                return kind
        if is_tar(path.name):
            return SourceKind.WEBDATASET
        raise DataConfigError(
            f"{path}: ingest reads a folder, a .csv, .tsv, .jsonl, .json, .parquet, .arrow or .tar; for another file "
            "name give its kind with --from"
        )
    if (path / ".nv-meta").is_dir():
        return SourceKind.ENERGON
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # Dataset.save_to_disk
        return SourceKind.ARROW
    names = [name for _, _, files in walk_folder(path) for name in files]
    # Look for tars first: img2dataset leaves Parquet files with statistics next to its tars.
    if any(is_tar(name) for name in names):
        return SourceKind.WEBDATASET
    return SourceKind.PARQUET if any(name.lower().endswith(".parquet") for name in names) else SourceKind.FOLDER


def _imagefolder(folder: Path) -> Path | None:
    """Return the metadata list of a ``datasets`` imagefolder; None for any other folder."""
    is_other = (folder / ".nv-meta").is_dir() or any(is_tar(n) for _, _, names in walk_folder(folder) for n in names)
    return None if is_other else metadata_file(folder)


def is_tar(name: str) -> bool:
    """Whether a file name is that of a tar, compressed or not."""
    return name.lower().endswith(_TARS)
