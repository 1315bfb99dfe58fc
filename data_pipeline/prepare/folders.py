"""Read a folder of files as a source: files with one stem form one sample.

cats/1.jpg cats/1.txt     an image (or a video, 1.mp4, or a sound, 1.wav) and its caption; the key is cats/1
cats/1/0001.jpg ... cats/1.json   the frames of a video, if the JSON has their rate ``fps``; the key is cats/1
cats/1.jpg dogs/1.jpg     no text at all: the first folder names the class, and the class becomes the caption
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataConfigError, SampleError
from data_pipeline.io.json_member import parse_member
from data_pipeline.prepare.media_files import frame_names, read_file
from data_pipeline.prepare.records import CAPTION, dump_json, validated_members
from data_pipeline.prepare.rows import Members, SourceRow, chunks_of, read_rows
from data_pipeline.sample import StoredFrames
from data_pipeline.shards.frame_list import VIDEOS, rate_of
from data_pipeline.shards.media_kind import MEDIA_FORMATS, media_kind
from data_pipeline.shards.tar_members import split_name

CLASS = "class"
"""JSON field for the name of the class."""


def walk_folder(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Yield (prefix, path, sorted file names) for a folder and each folder below it, in sorted order.

    The prefix is the path relative to ``folder`` with a final slash, or "" for ``folder`` itself. Hidden files and
    folders are skipped, and links to folders are not followed.
    """
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(path, folder).replace(os.sep, "/")
        visible = sorted(name for name in files if not name.startswith("."))
        yield "" if relative == "." else f"{relative}/", Path(path), visible


class FolderSource:
    """Media, ``.txt`` and ``.json`` files of one stem below a folder, sorted by name; the stem is the key.

    Args:
        folder: The folder.
        classes: Whether the first folder of a file is its class. None decides: yes if there is no text at all and
            every file is in a subfolder.

    Raises:
        DataConfigError: there are no files, two files would be one member, or ``classes`` is true and a file is in no
            subfolder.
    """

    def __init__(self, folder: Path, classes: bool | None = False) -> None:
        self._folder = folder
        digest, self._count, names, texts, unclassed = hashlib.sha256(), 0, set[str](), False, None
        for row in self._rows():
            self._count += 1
            texts = texts or any(ext in ("txt", "json") for ext, _ in row.reference)
            name, slash, _ = row.key.partition("/")
            names.add(name)
            unclassed = unclassed if slash else row.reference[0][1]
            sizes = [(name.name, name.stat().st_size if name.exists() else -1) for _, name in row.reference]
            digest.update(f"{row.key!a} {sizes!a}\n".encode())
        if not self._count:
            raise DataConfigError(f"{folder}: no files to ingest; give a folder of images and texts, a list, or tars")
        if classes and unclassed is not None:
            raise DataConfigError(f"{unclassed}: is in no class folder; move it into one of them")
        by_class = classes or (classes is None and not texts and unclassed is None)
        self.reader = _FileReader(folder if by_class else None)
        digest.update(str(by_class).encode())
        self._digest = digest.hexdigest()
        by_name = f" in {len(names)} classes, the class becomes the caption" if by_class else ""
        self.description = f"a folder of {self._count:,} samples{by_name} (files with one stem are one sample)"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        return chunks_of(self._rows())

    def count(self) -> int:
        return self._count

    def digest(self) -> str:
        return self._digest

    def _rows(self) -> Iterator[SourceRow]:
        number, in_frames = 0, set[str]()
        for prefix, folder, names in walk_folder(self._folder):
            if prefix[:-1] in in_frames:
                continue  # These images belong to a sample of the folder above.
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
                if "json" in files and (frames := _frames_beside(files["json"])):
                    in_frames.add(prefix + key)
                    files |= frames
                yield SourceRow(number, prefix + key, tuple(sorted(files.items())))


def _frames_beside(json: Path) -> dict[str, Path]:
    """Return the frames in the folder ``X`` beside ``X.json`` by member extension, in order; none without a rate."""
    folder = json.with_suffix("")
    if not folder.is_dir() or folder.is_symlink():
        return {}
    try:
        fields = parse_member(read_file(json))
    except SampleError:
        return {}
    if not isinstance(fields, dict) or "fps" not in fields:
        return {}
    names = frame_names(sorted(os.listdir(folder)))
    digits = max(4, len(str(len(names) - 1)))  # The order of the extensions is that of the frames.
    return {
        f"{number:0{digits}d}.{name.rpartition('.')[2].lower()}": folder / name for number, name in enumerate(names)
    }


def read_frames(folder: Path, most_bytes: int) -> tuple[StoredFrames, str]:
    """Read a video in frames: the images of a folder, whose rate is ``fps`` in the JSON file beside it.

    Args:
        folder: The folder; its JSON file has the same name and ``.json``.
        most_bytes: Largest size of all images together.

    Returns:
        The frames, and the member extension that ingesting them gives the first one.

    Raises:
        SampleError: the folder has no images, too many of them or too large ones, or the file has no valid rate.
    """
    json = Path(f"{os.path.abspath(folder)}.json")
    files = _frames_beside(json)
    if not files:
        raise SampleError(
            "no video in frames, which is a folder of images (not a link) with the rate of the frames in "
            f'{json.name} beside it: {{"fps": 8}}'
        )
    rate = rate_of(parse_member(read_file(json))["fps"], len(files))
    images = list[bytes]()
    for path in files.values():
        images.append(read_file(path))
        most_bytes -= len(images[-1])
        if most_bytes < 0:
            raise SampleError("the images are too large together; choose fewer or smaller frames")
    return StoredFrames(tuple(images), rate), next(iter(files))


@dataclass(frozen=True)
class _FileReader:
    classes_below: Path | None
    """The folder whose subfolders are classes; None without classes."""

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        return read_rows(rows, self._read)

    def _read(self, files: tuple[tuple[str, Path], ...]) -> Members:
        for ext, path in files:
            if media_kind(ext) is None and ext not in ("txt", "json"):
                raise SampleError(f"{path}: neither {MEDIA_FORMATS} nor .txt or .json")
        members = {ext: read_file(path) for ext, path in files}
        beside = next((path.with_suffix("") for ext, path in files if ext == "json"), None)
        if frames := [ext for ext, path in files if path.parent == beside]:
            fields = parse_member(members["json"])
            rate = rate_of(fields.pop("fps"), len(frames))
            members["json"] = dump_json({**fields, VIDEOS: [{"video": frames, "fps": rate}]})
        if self.classes_below is not None and "json" not in members:
            name = files[0][1].relative_to(self.classes_below).parts[0]
            members["json"] = dump_json({CLASS: name} if "txt" in members else {CLASS: name, CAPTION: name})
        return validated_members(members)
