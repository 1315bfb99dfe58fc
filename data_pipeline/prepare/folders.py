"""A folder of files as a source: files with one stem are one sample.

cats/1.jpg cats/1.txt     an image and its caption; the key is cats/1
cats/1.jpg dogs/1.jpg     no text at all: the first folder names the class, which becomes the caption
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.prepare.records import CAPTION, checked, dump_json, read_file
from data_pipeline.prepare.rows import Members, Row, read_each, spans_of
from data_pipeline.shards.image_header import is_image
from data_pipeline.shards.tar_members import split_name

CLASS = "class"
"""Field of the JSON that holds the name of the class."""


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
    """Images and same-stem ``.txt`` or ``.json`` files below a folder; the stem is the key, the order is by name.

    Args:
        folder: The folder.
        classes: Whether its folders are classes; None: they are if there is no text at all and no image beside them.

    Raises:
        DataConfigError: there are no files, or classes were asked for and a file lies beside them.
    """

    def __init__(self, folder: Path, classes: bool | None = False) -> None:
        self._folder = folder
        digest, self._count, names, texts, beside = hashlib.sha256(), 0, set[str](), False, None
        for row in self._rows():
            self._count += 1
            texts = texts or any(not is_image(ext) for ext, _ in row.reference)
            name, slash, _ = row.key.partition("/")
            names.add(name)
            beside = beside if slash else row.reference[0][1]
            sizes = [(name.name, name.stat().st_size if name.exists() else -1) for _, name in row.reference]
            digest.update(f"{row.key!a} {sizes!a}\n".encode())
        if not self._count:
            raise DataConfigError(f"{folder}: no files to ingest")
        if classes and beside is not None:
            raise DataConfigError(f"{beside}: lies beside the folders of the classes, so it has none; move it into one")
        by_class = classes or (classes is None and not texts and beside is None)
        self.reader = _FileReader(folder if by_class else None)
        digest.update(str(by_class).encode())
        self._digest = digest.hexdigest()
        what = f" in {len(names)} classes, the class becomes the caption" if by_class else ""
        self.description = f"a folder of {self._count:,} samples{what} (files with one stem are one sample)"

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
    classes_below: Path | None
    """The folder whose folders are classes; None without classes."""

    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        return read_each(rows, self._read)

    def _read(self, files: tuple[tuple[str, Path], ...]) -> Members:
        for ext, path in files:
            if not is_image(ext) and ext not in ("txt", "json"):
                raise SampleError(f"{path}: neither an image (.jpg .jpeg .png .webp) nor .txt or .json")
        members = {ext: read_file(path) for ext, path in files}
        if self.classes_below is not None and "json" not in members:
            name = files[0][1].relative_to(self.classes_below).parts[0]
            members["json"] = dump_json({CLASS: name} if "txt" in members else {CLASS: name, CAPTION: name})
        return checked(members)
