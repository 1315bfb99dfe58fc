"""The log of rows that an ingest skipped, one JSON line each: ``{"row": 7, "key": "000000007", "reason": "..."}``.

During the ingest the file has a hidden name next to the shards. A resumed ingest keeps the lines of rows before the end
of its last finished shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from data_pipeline.errors import DataConfigError
from data_pipeline.io.atomic import partial_path, publish
from data_pipeline.io.untrusted import append_regular, parse_json, read_lines


class SkippedRow(NamedTuple):
    """A row that an ingest skipped; ``row`` is its number in the source, from 1."""

    row: int
    key: str
    reason: str


def last_stored_row(path: Path, num_stored: int) -> int:
    """Return the number of the row that became the last of ``num_stored`` samples; 0 if none is stored.

    Every skipped row before it shifts the number by one.

    Args:
        path: Final path of the skipped-row log. If it does not exist, the unfinished log is read.
        num_stored: Number of samples in finished shards.

    Raises:
        DataConfigError: the log is damaged.
    """
    last = num_stored
    log = path if path.exists() else partial_path(path)
    if num_stored and log.exists():
        for _, skipped in _complete_lines(log):
            if skipped.row > last:
                break
            last += 1
    return last


def _complete_lines(path: Path) -> Iterator[tuple[bytes, SkippedRow]]:
    """Yield each line and its row. A last line without newline, left by a killed ingest, is ignored.

    Raises:
        DataConfigError: the log is damaged.
    """
    try:
        for line in read_lines(path):
            if not line.endswith(b"\n"):
                return
            record = parse_json(line)
            yield line, SkippedRow(int(record["row"]), str(record["key"]), str(record["reason"]))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataConfigError(f"{path} is damaged ({error!r}); remove its folder and ingest again") from error


class SkippedRowLog:
    """The skipped-row log of a running ingest. Use it as a context manager; it is published only by ``publish``.

    Args:
        path: Final path of the log.
        last_row: Last row that is already stored or skipped. Lines of later rows, left by an interrupted ingest, are
            removed, because those rows are read again.
    """

    def __init__(self, path: Path, last_row: int) -> None:
        self._path, self._partial = path, partial_path(path)
        self._file: IO[bytes] | None = None
        self.count = 0
        kept_bytes = 0
        if path.exists():  # An earlier ingest died after it published the log and before it finished.
            os.replace(path, self._partial)
        if self._partial.exists():
            for line, skipped in _complete_lines(self._partial):
                if skipped.row > last_row:
                    break
                self.count += 1
                kept_bytes += len(line)
            os.truncate(self._partial, kept_bytes)
            if not kept_bytes:
                self._partial.unlink()

    def add(self, skipped: SkippedRow) -> None:
        """Append a row."""
        if self._file is None:
            self._file = append_regular(self._partial)
        self._file.write(json.dumps(skipped._asdict(), ensure_ascii=True).encode() + b"\n")
        self.count += 1

    def sync(self) -> None:
        """Flush the appended rows to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> Path | None:
        """Close the log, move it to its final path and return that path; None, and no file, if no row was skipped."""
        self.__exit__(None, None, None)
        if not self.count:
            return None
        publish(self._partial, self._path)
        return self._path

    def __enter__(self) -> SkippedRowLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_skipped(path: Path | None) -> Iterator[SkippedRow]:
    """Yield the rows of a published log; nothing for None."""
    if path is not None:
        yield from (skipped for _, skipped in _complete_lines(path))
