"""Rows that an ingest left out, one JSON line each: ``{"row": 7, "key": "000000007", "reason": "..."}``.

The file grows hidden, beside the shards; a resumed ingest keeps what was noted before its last finished shard.
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
    """A row that was left out; ``row`` counts from 1."""

    row: int
    key: str
    reason: str


def row_of_stored(path: Path, num_stored: int) -> int:
    """Number of the row that became the last of ``num_stored`` samples, by the rows noted before it; 0 for none.

    Args:
        path: The list of skipped rows, whole or unfinished.
        num_stored: Samples in finished shards.
    """
    last = num_stored
    place = path if path.exists() else partial_path(path)
    if num_stored and place.exists():
        for _, skipped in _whole_lines(place):
            if skipped.row > last:
                break
            last += 1
    return last


def _whole_lines(path: Path) -> Iterator[tuple[bytes, SkippedRow]]:
    """Each line and what it holds; a last one that a kill cut is left out.

    Raises:
        DataConfigError: the list is damaged.
    """
    try:
        for line in read_lines(path):
            if not line.endswith(b"\n"):
                return
            record = parse_json(line)
            yield line, SkippedRow(int(record["row"]), str(record["key"]), str(record["reason"]))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataConfigError(f"{path} is damaged ({error!r}); remove its folder and ingest again") from error


class SkippedRows:
    """The growing list.

    Args:
        path: Its name once it is whole.
        last_row: Notes of later rows, left by an interrupted ingest, are dropped: those rows are read again.
    """

    def __init__(self, path: Path, last_row: int) -> None:
        self._path, self._partial = path, partial_path(path)
        self._file: IO[bytes] | None = None
        self.count = 0
        kept_bytes = 0
        if path.exists():  # The run died after naming the list and before it was done.
            os.replace(path, self._partial)
        if self._partial.exists():
            for line, skipped in _whole_lines(self._partial):
                if skipped.row > last_row:
                    break
                self.count += 1
                kept_bytes += len(line)
            os.truncate(self._partial, kept_bytes)
            if not kept_bytes:
                self._partial.unlink()

    def add(self, skipped: SkippedRow) -> None:
        """Notes a row."""
        if self._file is None:
            self._file = append_regular(self._partial)
        self._file.write(json.dumps(skipped._asdict(), ensure_ascii=True).encode() + b"\n")
        self.count += 1

    def sync(self) -> None:
        """What was noted is on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> Path | None:
        """Names the list; None if it is empty."""
        self.__exit__(None, None, None)
        if not self.count:
            return None
        publish(self._partial, self._path)
        return self._path

    def __enter__(self) -> SkippedRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_skipped(path: Path | None) -> Iterator[SkippedRow]:
    """The rows of a published list; none for None."""
    if path is not None:
        yield from (skipped for _, skipped in _whole_lines(path))
