"""Interfaces of a source of samples: rows in a fixed order, and a reader that any process can use.

    RowSource.chunks() --rows--> [process 0, 1, ...] RowReader.read(rows) --members or SampleError--> the writer

Listing a row is cheap (a path, a line, an offset); reading it is expensive. So one process lists the rows and several
processes read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.errors import SampleError

Members = dict[str, bytes]
"""Bytes of a sample's members, by extension."""

CHUNK_ROWS = 32
"""Rows that a process reads at a time."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source; it becomes one sample.

    Attributes:
        number: Position in the source, from 1.
        key: Key of the sample. ``ingest`` raises if two samples of one new shard have the same key.
        reference: Whatever the source's own reader needs to read the row; or the ``SampleError`` of listing it.
    """

    number: int
    key: str
    reference: Any


class RowReader(Protocol):
    """Reads rows. Every worker process gets a pickled copy, so keep it small."""

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        """Yield, for each row in order, its members or the error that makes it unusable."""
        ...


class RowSource(Protocol):
    """Rows in a fixed order.

    Attributes:
        description: The detected format and size in a few words, for the user.
    """

    description: str

    @property
    def reader(self) -> RowReader:
        """The reader of these rows."""
        ...

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        """Yield all rows in chunks that one process reads. Every call must yield the same rows in the same order."""
        ...

    def count(self) -> int | None:
        """Return the number of rows, or None if only reading the source would give it."""
        ...

    def digest(self) -> str:
        """Return a hexadecimal digest that changes when the rows change. A resumed ingest compares it."""
        ...


def row_name(number: int, key: str) -> str:
    """Return a row's name for messages: its number, and its key unless that is the number too."""
    return f"row {number}" if key.lstrip("0") == str(number) else f"row {number} ({key})"


def chunks_of(rows: Iterable[SourceRow]) -> Iterator[Sequence[SourceRow]]:
    """Yield chunks of ``CHUNK_ROWS`` rows; the last one may be shorter."""
    rows = iter(rows)
    while span := list(itertools.islice(rows, CHUNK_ROWS)):
        yield span


def read_rows(rows: Sequence[SourceRow], read: Callable[[Any], Members]) -> Iterator[Members | SampleError]:
    """Yield ``read(row.reference)`` for each row, or the ``SampleError`` that it raises or that listing the row met."""
    for row in rows:
        if isinstance(row.reference, SampleError):
            yield row.reference
            continue
        try:
            yield read(row.reference)
        except SampleError as error:
            yield error
