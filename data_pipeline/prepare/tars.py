"""Tars of other tools as a source: webdataset, img2dataset (LAION, DataComp), Energon, OBELICS and MMC4.

    a tar --headers--> rows (key, offsets) --any process--> members --layouts--> members as training reads them

Keys are kept; of several tars each key is preceded by its tar's name (``00012/000120345``), since tools count anew in
each. A compressed tar has no places to jump to: it is unpacked by the process that lists the rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DataConfigError, ManifestError, SampleError, ShardError
from data_pipeline.io.untrusted import open_regular, read_json
from data_pipeline.prepare.choices import SourceKind
from data_pipeline.prepare.energon_source import EnergonFolder
from data_pipeline.prepare.folders import walk_folder
from data_pipeline.prepare.foreign_members import Layout, guess_layout, unpacked
from data_pipeline.prepare.rows import Members, Row, read_each, spans_of
from data_pipeline.prepare.sources import is_tar
from data_pipeline.shards.index import ShardIndex, open_tar
from data_pipeline.shards.tar_members import walk
from data_pipeline.shards.tar_stream import stream_members, stream_samples

_LAYOUTS = {
    SourceKind.WEBDATASET: Layout.PLAIN,
    SourceKind.IMG2DATASET: Layout.IMG2DATASET,
    SourceKind.OBELICS: Layout.OBELICS,
    SourceKind.MMC4: Layout.MMC4,
}


def open_tars(path: Path, kind: SourceKind, *, guess: bool, split: str) -> TarSource:
    """The tars at ``path``, a file or a folder.

    Args:
        path: A tar, a folder with tars at any depth, or an Energon folder.
        kind: What they are.
        guess: Look at the first sample, and take another layout than ``kind`` says if it has one.
        split: Which split of an Energon folder.

    Raises:
        DataConfigError: there are none, or Energon's files cannot be used.
    """
    if kind is SourceKind.ENERGON:
        folder = EnergonFolder.open(path, split)
        return TarSource(path, folder.tars, folder.convert, f"an Energon folder, {folder.description}")
    tars = [path] if path.is_file() else [d / n for _, d, names in walk_folder(path) for n in names if is_tar(n)]
    if not tars:
        raise DataConfigError(f"{path}: no .tar below it")
    if kind not in _LAYOUTS:
        raise DataConfigError(f"{path}: a tar or a folder of tars cannot be read as {kind.value}")
    layout = _LAYOUTS[kind]
    if guess:
        plain = TarSource(path, tars, Layout.PLAIN.convert, "")
        first = next(plain.raw(), None)
        layout = layout if first is None else guess_layout(first)
    return TarSource(path, tars, layout.convert, f"{layout.description}, {len(tars)} tars")


class TarSource:
    """Samples of tars, in the order of the tars."""

    def __init__(self, root: Path, tars: Sequence[Path], convert: Any, description: str) -> None:
        self._tars = list(tars)
        folder = root if root.is_dir() else root.parent
        stems = [_stem(os.path.relpath(tar, folder).replace(os.sep, "/")) for tar in tars]
        self._prefixes = [f"{stem}/" for stem in stems] if len(tars) > 1 else [""]
        if len(set(self._prefixes)) < len(tars):
            raise DataConfigError(f"{root}: two tars have one name but for their suffix; move one of them")
        self.reader = TarReader(tuple(self._tars), convert)
        self.description = description

    def spans(self) -> Iterator[Sequence[Row]]:
        return spans_of(self._rows())

    def count(self) -> int | None:
        counts = [_known_count(tar) for tar in self._tars]
        return None if None in counts else sum(count for count in counts if count is not None)

    def digest(self) -> str:
        import hashlib

        digest = hashlib.sha256(repr(self.reader.convert).encode())
        for prefix, tar in zip(self._prefixes, self._tars, strict=True):
            digest.update(f"{prefix!a} {tar.stat().st_size}\n".encode())
        return digest.hexdigest()

    def raw(self) -> Iterator[Members]:
        """Members of each readable sample as they lie in the tars."""
        for row in self._rows():
            with contextlib.suppress(SampleError):
                if not isinstance(row.reference, SampleError):
                    yield unpacked(self.reader.raw(row.reference))

    def _rows(self) -> Iterator[Row]:
        number = 0
        for which, (prefix, tar) in enumerate(zip(self._prefixes, self._tars, strict=True)):
            packed = not tar.name.lower().endswith(".tar")
            for key, reference in _samples(tar, _packed_members(tar) if packed else _plain_members(tar)):
                number += 1
                found = reference if isinstance(reference, SampleError) else (which, tuple(reference.items()))
                yield Row(number, prefix + key, found)


def _stem(name: str) -> str:
    lowered = name.lower()
    suffix = max((end for end in (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz") if lowered.endswith(end)), key=len)
    return name[: -len(suffix)]


def _known_count(tar: Path) -> int | None:
    """Samples of a tar where a file beside it says so: an index of ours, or img2dataset's statistics."""
    with contextlib.suppress(ManifestError, OSError):
        return len(ShardIndex.read(tar))
    try:
        statistics = read_json(tar.with_name(f"{_stem(tar.name)}_stats.json"))
        return int(statistics["successes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


Span = tuple[int, int]
"""(first byte, number of bytes) of a member in its tar."""


def _samples(tar: Path, members: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
    """Samples by webdataset's rule. Damage ends the tar, with a row that says so."""
    for key, found in stream_samples(members, str(tar)):
        if isinstance(found, ShardError):  # The sample in hand may lack what comes behind the damage.
            yield key, SampleError(f"{found}; this sample and what follows it in the tar is lost")
        else:
            yield key, found


def _plain_members(tar: Path) -> Iterator[tuple[str, Span]]:
    with open_tar(tar) as data:
        for member in walk(data, str(tar)):
            yield member.name, (member.offset, member.size)


def _packed_members(tar: Path) -> Iterator[tuple[str, bytes]]:
    """Members of a compressed tar with their content."""
    try:
        stream = open_regular(tar)
    except OSError as error:
        raise ShardError(f"{tar}: cannot be read: {error.strerror}") from error
    with stream:
        yield from stream_members(stream, str(tar))


@dataclass
class TarReader:
    """Reads samples by offset. Keeps the last tar open; one per process."""

    tars: tuple[Path, ...]
    convert: Any
    """Members to members; sent to other processes, so a function or a dataclass."""
    _which: int = -1
    _file: IO[bytes] | None = None

    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        return read_each(rows, lambda reference: self.convert(unpacked(self.raw(reference))))

    def raw(self, reference: tuple[int, tuple[tuple[str, Span | bytes], ...]]) -> Members:
        """The members as they lie in the tar."""
        which, members = reference
        return {
            ext: content if isinstance(content, bytes) else self._content(which, *content) for ext, content in members
        }

    def _content(self, which: int, offset: int, size: int) -> bytes:
        if which != self._which or self._file is None:
            if self._file is not None:
                self._file.close()
            self._which, self._file = which, open_regular(self.tars[which])
        content = os.pread(self._file.fileno(), size, offset)
        while len(content) < size:  # One pread returns at most 2 GiB.
            more = os.pread(self._file.fileno(), size - len(content), offset + len(content))
            if not more:
                raise SampleError(f"{self.tars[which]}: became shorter while it was read")
            content += more
        return content
