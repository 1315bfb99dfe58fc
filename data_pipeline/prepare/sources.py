"""Where ingest finds its samples: which kind of source a path is.

A new format is one file with its source, a member of ``choices.SourceKind`` and its line in ``FORMATS``.
Folders are in ``folders``, CSV, TSV and JSONL in ``lists``, Parquet in ``parquet``, tars of other tools in ``tars``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import DataConfigError
from data_pipeline.prepare.choices import SourceKind
from data_pipeline.prepare.folders import FolderSource, walk_folder
from data_pipeline.prepare.lists import ListSource
from data_pipeline.prepare.recognised import metadata_file
from data_pipeline.prepare.records import FieldNames, FileLoader
from data_pipeline.prepare.rows import Source
from data_pipeline.shards.image_header import is_image
from data_pipeline.storage.location import local_path

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


_DOCUMENTS = (SourceKind.OBELICS, SourceKind.MMC4, SourceKind.IMG2DATASET)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
        kind: What it is.
        names: New names for columns, and columns to leave out; for lists and Parquet.
        split: Which split of an Energon folder.
        images: Folder of the images that a list or Parquet names; None: the folder of the list.
        drop_images: Leave unreadable images out of documents (``parts``) instead of refusing the whole document.
    """

    kind: SourceKind = SourceKind.AUTO
    names: FieldNames = field(default_factory=FieldNames)
    split: str = "train"
    images: Path | None = None
    drop_images: bool = False


@dataclass(frozen=True)
class SourceFormat:
    """How ingest recognises and opens sources of one kind.

    Attributes:
        open: From the path, the kind and the options to the source.
        suffixes: Suffixes, in lower case, of files that are of this kind unless the options say otherwise.
        is_list: Whether it names files and has columns: the options ``names``, ``images`` and ``drop_images`` apply.
    """

    open: Callable[[Path, SourceKind, SourceOptions], Source]
    suffixes: tuple[str, ...] = ()
    is_list: bool = False


def _open_folder(path: Path, kind: SourceKind, options: SourceOptions) -> Source:
    return FolderSource(path, None if options.kind is SourceKind.AUTO else kind is SourceKind.CLASSES)


def _open_list(path: Path, kind: SourceKind, options: SourceOptions) -> Source:
    images = options.images
    load = FileLoader(path.parent) if images is None else FileLoader(images, holds_urls=True)
    return ListSource(path, kind.value, options.names, load, options.drop_images)


def _open_parquet(path: Path, kind: SourceKind, options: SourceOptions) -> Source:
    from data_pipeline.prepare.parquet import ParquetSource  # pyarrow is an extra.

    return ParquetSource(path, options.names, options.images, options.drop_images)


def _open_tars(path: Path, kind: SourceKind, options: SourceOptions) -> Source:
    from data_pipeline.prepare.tars import open_tars

    return open_tars(path, kind, guess=options.kind is SourceKind.AUTO, split=options.split)


FORMATS = {
    SourceKind.FOLDER: SourceFormat(_open_folder),
    SourceKind.CLASSES: SourceFormat(_open_folder),
    SourceKind.CSV: SourceFormat(_open_list, (".csv",), is_list=True),
    SourceKind.TSV: SourceFormat(_open_list, (".tsv",), is_list=True),
    SourceKind.JSONL: SourceFormat(_open_list, (".jsonl", ".ndjson"), is_list=True),
    SourceKind.PARQUET: SourceFormat(_open_parquet, (".parquet",), is_list=True),
    SourceKind.WEBDATASET: SourceFormat(_open_tars),
    SourceKind.IMG2DATASET: SourceFormat(_open_tars),
    SourceKind.ENERGON: SourceFormat(_open_tars),
    SourceKind.OBELICS: SourceFormat(_open_tars),
    SourceKind.MMC4: SourceFormat(_open_tars),
}
"""All kinds but ``auto``."""


def open_source(path: str | Path, options: SourceOptions | None = None) -> Source:
    """The source at ``path``.

    Raises:
        DataConfigError: nothing is there, it is of another kind than asked for, or an option does not apply to it.
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
        _refuse_list_options(path, kind, options)
    return FORMATS[kind].open(path, kind, options)


def warnings(path: str | Path, source: Source) -> Iterator[str]:
    """A sentence if ``path`` is a folder that is read by its list, and the list leaves out images of the folder."""
    folder = local_path(path, "ingest reads")
    if not folder.is_dir() or not isinstance(source, ListSource):
        return
    named = set(source.images())
    found = (place / name for _, place, names in walk_folder(folder) for name in names if is_image(name.lower()))
    left = [image for image in map(os.path.normpath, found) if Path(image) not in named]
    if left:
        yield (
            f"{len(left):,} images of {folder} are left out, since no row of its list names them; the first: {left[0]}"
        )


def _refuse_list_options(path: Path, kind: SourceKind, options: SourceOptions) -> None:
    if options.names != FieldNames():
        raise DataConfigError(
            f"{path}: columns can be renamed or dropped in csv, tsv, jsonl and parquet, this is {kind.value}"
        )
    if options.images is not None or options.drop_images:
        raise DataConfigError(
            f"{path}: --images and --drop-images are for lists and Parquet that name files, this is {kind.value}"
        )


def _kind_of(path: Path) -> SourceKind:
    """Told from names alone; which layout tars have is told later, from the first sample."""
    if path.is_file():
        for kind, known in FORMATS.items():
            if path.suffix.lower() in known.suffixes:
                return kind
        if is_tar(path.name):
            return SourceKind.WEBDATASET
        raise DataConfigError(
            f"{path}: ingest takes a folder, a .csv, .tsv, .jsonl, .parquet or .tar; name its kind with --from"
        )
    if (path / ".nv-meta").is_dir():
        return SourceKind.ENERGON
    names = [name for _, _, files in walk_folder(path) for name in files]
    # img2dataset leaves Parquet files with its statistics beside its tars: tars come first.
    if any(is_tar(name) for name in names):
        return SourceKind.WEBDATASET
    return SourceKind.PARQUET if any(name.lower().endswith(".parquet") for name in names) else SourceKind.FOLDER


def _imagefolder(folder: Path) -> Path | None:
    """The list of a folder of images that ``datasets`` reads as an imagefolder."""
    is_other = (folder / ".nv-meta").is_dir() or any(is_tar(n) for _, _, names in walk_folder(folder) for n in names)
    return None if is_other else metadata_file(folder)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar, compressed or not."""
    return name.lower().endswith(_TARS)
