"""Files of Arrow record batches: Parquet, and the Arrow streams that ``datasets.Dataset.save_to_disk`` writes.

Both are read in groups of rows, because a file can be decoded only from the start of a group. Needs pyarrow (extra
``parquet``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import DataConfigError
from data_pipeline.io.checksums import sha256_of
from data_pipeline.io.untrusted import UntrustedError, open_regular, read_json
from data_pipeline.prepare.folders import walk_folder

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise DataConfigError("Parquet and Arrow need pyarrow: pip install 'mmscale[parquet]'") from error

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that ``save_to_disk`` writes next to the Arrow files of one split, and next to the folders of several."""
_BATCH_ROWS = 64


class TableFile(Protocol):
    """An open file of rows."""

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the columns, with the file's metadata."""
        ...

    @property
    def group_rows(self) -> list[int]:
        """Number of rows of each group."""
        ...

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a group in order, in batches of at most 64 rows."""
        ...

    def digest(self) -> bytes:
        """Return bytes that change when the rows change."""
        ...


class ParquetFile:
    """A Parquet file; its groups are row groups."""

    def __init__(self, path: Path) -> None:
        self._path = path
        open_regular(path).close()  # Raises for a FIFO, on which pyarrow would block.
        self._file = pq.ParquetFile(path)
        self.schema: pa.Schema = pq.read_schema(path)

    @property
    def group_rows(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns))

    def digest(self) -> bytes:
        """Return the size, and the metadata at the file's end: sizes and statistics of every column chunk."""
        with open_regular(self._path) as opened:
            opened.seek(-8, os.SEEK_END)
            end = opened.read(8)
            size = self._path.stat().st_size
            opened.seek(-min(8 + int.from_bytes(end[:4], "little"), size), os.SEEK_END)
            return f"{size}\n".encode() + opened.read()


class ArrowFile:
    """An Arrow stream; its groups are record batches.

    The file is memory-mapped, so a reader skips the batches before a group without reading their rows.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        open_regular(path).close()
        with self._open() as stream:
            self.schema: pa.Schema = stream.schema
            self.group_rows = [batch.num_rows for batch in stream]

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with self._open() as stream:
            for number, batch in enumerate(stream):
                if number == group:
                    kept = batch.select(list(columns))
                    yield from (kept.slice(start, _BATCH_ROWS) for start in range(0, len(kept), _BATCH_ROWS))
                    return

    def digest(self) -> bytes:
        return sha256_of(self._path).encode()

    def _open(self) -> Any:
        return pa.ipc.open_stream(pa.memory_map(str(self._path)))


def open_table(path: Path) -> TableFile:
    """Open a file; its suffix decides the format.

    Raises:
        DataConfigError: it cannot be read.
    """
    is_arrow = path.suffix.lower() == ".arrow"
    try:
        return ArrowFile(path) if is_arrow else ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataConfigError(f"{path}: not a readable {'Arrow' if is_arrow else 'Parquet'} file: {error}") from error


def table_files(path: Path) -> list[Path]:
    """Return the files at ``path``: the path itself, the files of a folder of ``save_to_disk``, or all Parquet below.

    Raises:
        DataConfigError: there are none, the folder holds several splits, or its list of files is damaged.
    """
    if path.is_file():
        return [path]
    if (path / SPLITS).is_file():
        names = sorted(child.parent.name for child in path.glob(f"*/{STATE}"))
        raise DataConfigError(f"{path}: holds the splits {', '.join(names)}: ingest one at a time, by its folder")
    if (path / STATE).is_file():
        return _listed_files(path)
    found = [parent / n for _, parent, names in walk_folder(path) for n in names if n.lower().endswith(".parquet")]
    if not found:
        raise DataConfigError(f"{path}: contains no .parquet")
    return found


def _listed_files(folder: Path) -> list[Path]:
    """Return the files that ``state.json`` lists, in its order."""
    state = folder / STATE
    try:
        listed = read_json(state)
        names = [entry["filename"] for entry in listed["_data_files"]]
        if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            raise UntrustedError("_data_files must list the names of files in this folder")
        if listed.get("_indices_data_files"):
            raise UntrustedError("an index selects its rows (datasets 1); load and save it again with datasets")
    except (UntrustedError, OSError, LookupError, TypeError) as error:
        raise DataConfigError(f"{state}: not the list of a saved data set: {error}") from error
    return [folder / name for name in names]
