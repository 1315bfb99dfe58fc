"""Read tars of other tools as a source: webdataset, img2dataset (LAION, DataComp), Energon, OBELICS and MMC4.

    a tar --headers--> rows (key, offsets) --any process--> members --layout--> members as training reads them

Keys are kept. With several tars, each key gets its tar's name as a prefix (``00012/000120345``), because tools restart
their numbering in each tar. A compressed tar has no random access, so the process that lists the rows decompresses it
and sends the members' bytes with the rows.
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
from data_pipeline.prepare.rows import Members, SourceRow, chunks_of, read_rows
from data_pipeline.prepare.sources import is_tar
from data_pipeline.prepare.tar_layouts import SampleLayout, guess_layout, gunzip_members
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.tar_members import open_tar, walk
from data_pipeline.shards.tar_stream import stream_members, stream_samples

_LAYOUTS = {
    SourceKind.WEBDATASET: SampleLayout.PLAIN,
    SourceKind.IMG2DATASET: SampleLayout.IMG2DATASET,
    SourceKind.OBELICS: SampleLayout.OBELICS,
    SourceKind.MMC4: SampleLayout.MMC4,
}


def open_tars(path: Path, kind: SourceKind, *, guess: bool, split: str) -> TarSource:
    """Open the tars at ``path``.

    Args:
        path: A tar, a folder with tars at any depth, or an Energon folder.
        kind: Their kind.
        guess: Guess the layout from the first readable sample; ``kind`` decides only if there is none.
        split: Split of an Energon folder to read.

    Raises:
        DataConfigError: there are no tars, ``kind`` is not a kind of tars, or Energon's metadata cannot be used.
    """
    if kind is SourceKind.ENERGON:
        folder = EnergonFolder.open(path, split)
        return TarSource(path, folder.tars, folder.convert, f"an Energon folder, {folder.description}")
    tars = [path] if path.is_file() else [d / n for _, d, names in walk_folder(path) for n in names if is_tar(n)]
    if not tars:
        raise DataConfigError(f"{path}: contains no .tar")
    if kind not in _LAYOUTS:
        raise DataConfigError(f"{path}: a tar or a folder of tars cannot be read as {kind.value}")
    layout = _LAYOUTS[kind]
    if guess:
        plain = TarSource(path, tars, SampleLayout.PLAIN.convert, "")
        first = next(plain.raw(), None)
        layout = layout if first is None else guess_layout(first)
    return TarSource(path, tars, layout.convert, f"{layout.description}, {len(tars)} tars")


class TarSource:
    """Samples of tars, in the order of the tars.

    Args:
        root: The tar or the folder that the user named; keys are relative to it.
        tars: The tars, in order.
        convert: Converts a sample's members; a function or a dataclass, because it is sent to other processes.
        description: Text for the user.

    Raises:
        DataConfigError: two tars differ only in their suffix.
    """

    def __init__(self, root: Path, tars: Sequence[Path], convert: Any, description: str) -> None:
        self._tars = list(tars)
        folder = root if root.is_dir() else root.parent
        stems = [_stem(os.path.relpath(tar, folder).replace(os.sep, "/")) for tar in tars]
        self._prefixes = [f"{stem}/" for stem in stems] if len(tars) > 1 else [""]
        if len(set(self._prefixes)) < len(tars):
            raise DataConfigError(f"{root}: two tars differ only in their suffix; move one of them")
        self.reader = TarReader(tuple(self._tars), convert)
        self.description = description

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        return chunks_of(self._rows())

    def count(self) -> int | None:
        counts = [_known_count(tar) for tar in self._tars]
        return None if None in counts else sum(count for count in counts if count is not None)

    def digest(self) -> str:
        import hashlib

        convert = self.reader.convert  # The repr of a function contains its address, which differs between processes.
        digest = hashlib.sha256(getattr(convert, "__qualname__", repr(convert)).encode())
        for prefix, tar in zip(self._prefixes, self._tars, strict=True):
            digest.update(f"{prefix!a} {tar.stat().st_size}\n".encode())
        return digest.hexdigest()

    def raw(self) -> Iterator[Members]:
        """Yield the members of each readable sample, decompressed but not converted."""
        for row in self._rows():
            with contextlib.suppress(SampleError):
                if not isinstance(row.reference, SampleError):
                    yield gunzip_members(self.reader.raw(row.reference))

    def _rows(self) -> Iterator[SourceRow]:
        number = 0
        for tar_number, (prefix, tar) in enumerate(zip(self._prefixes, self._tars, strict=True)):
            packed = not tar.name.lower().endswith(".tar")
            for key, reference in _samples(tar, _packed_members(tar) if packed else _plain_members(tar)):
                number += 1
                found = reference if isinstance(reference, SampleError) else (tar_number, tuple(reference.items()))
                yield SourceRow(number, prefix + key, found)


def _stem(name: str) -> str:
    lowered = name.lower()
    suffix = max((end for end in (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz") if lowered.endswith(end)), key=len)
    return name[: -len(suffix)]


def _known_count(tar: Path) -> int | None:
    """Return the number of samples from a tar's index or from img2dataset's statistics; None if neither exists."""
    with contextlib.suppress(ManifestError, OSError):
        return len(ShardIndex.read(tar))
    try:
        statistics = read_json(tar.with_name(f"{_stem(tar.name)}_stats.json"))
        return int(statistics["successes"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


Extent = tuple[int, int]
"""(first byte, number of bytes) of a member in its tar."""


def _samples(tar: Path, members: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
    """Yield (key, members) by webdataset's rule. Damage ends the tar; the last key then has a ``SampleError``."""
    for key, found in stream_samples(members, str(tar)):
        if isinstance(found, ShardError):  # The current sample may lack members that follow the damage.
            yield key, SampleError(f"{found}; this sample and all that follow it in the tar are lost")
        else:
            yield key, found


def _plain_members(tar: Path) -> Iterator[tuple[str, Extent]]:
    with open_tar(tar) as data:
        for member in walk(data, str(tar)):
            yield member.name, (member.offset, member.size)


def _packed_members(tar: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each member of a compressed tar."""
    try:
        stream = open_regular(tar)
    except OSError as error:
        raise ShardError(f"{tar}: cannot be read: {error.strerror}") from error
    with stream:
        yield from stream_members(stream, str(tar))


@dataclass
class TarReader:
    """Reads samples by offset and keeps the last tar open. Every process has its own copy."""

    tars: tuple[Path, ...]
    convert: Any
    """Converts a sample's members; a function or a dataclass, because it is sent to other processes."""
    _open_number: int = -1
    _file: IO[bytes] | None = None

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        return read_rows(rows, lambda reference: self.convert(gunzip_members(self.raw(reference))))

    def raw(self, reference: tuple[int, tuple[tuple[str, Extent | bytes], ...]]) -> Members:
        """Return the members as stored in the tar."""
        tar_number, members = reference
        return {
            ext: content if isinstance(content, bytes) else self._content(tar_number, *content)
            for ext, content in members
        }

    def _content(self, tar_number: int, offset: int, size: int) -> bytes:
        if tar_number != self._open_number or self._file is None:
            if self._file is not None:
                self._file.close()
            self._open_number, self._file = tar_number, open_regular(self.tars[tar_number])
        content = os.pread(self._file.fileno(), size, offset)
        while len(content) < size:  # One pread returns at most 2 GiB.
            more = os.pread(self._file.fileno(), size - len(content), offset + len(content))
            if not more:
                raise SampleError(f"{self.tars[tar_number]}: became shorter while it was read")
            content += more
        return content
