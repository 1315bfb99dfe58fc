"""What a source of samples is: rows in a fixed order, and a reader that any process can use.

    Source.spans() --runs of rows--> [process 0, 1, ...] RowReader.read(rows) --members or a reason--> the writer

Rows are cheap to list (a path, a line, an offset) and dear to read, so one process lists them and several read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipeline.errors import SampleError

Members = dict[str, bytes]
"""Content of a sample by extension."""

SPAN_ROWS = 32
"""Rows that a process takes at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to be.

    Attributes:
        number: Place in the source, from 1.
        key: Key of its sample; no other row has it.
        reference: Where it is, for the reader; or the ``SampleError`` that listing it has met.
    """

    number: int
    key: str
    reference: Any


class RowReader(Protocol):
    """Reads rows; small enough to be sent to other processes."""

    def read(self, rows: Sequence[Row]) -> Iterator[Members | SampleError]:
        """For each row its members, or why it has none."""
        ...


class Source(Protocol):
    """Rows in a fixed order.

    Attributes:
        description: What it was taken for, in a few words.
    """

    description: str

    @property
    def reader(self) -> RowReader:
        """Reads its rows."""
        ...

    def spans(self) -> Iterator[Sequence[Row]]:
        """All rows, in runs that one process should read."""
        ...

    def count(self) -> int | None:
        """Number of rows, if it can be told without reading them."""
        ...

    def digest(self) -> str:
        """Changes when the rows do; hexadecimal."""
        ...


def spans_of(rows: Iterable[Row]) -> Iterator[Sequence[Row]]:
    """Runs of ``SPAN_ROWS``."""
    rows = iter(rows)
    while span := list(itertools.islice(rows, SPAN_ROWS)):
        yield span


def read_each(rows: Sequence[Row], read: Callable[[Any], Members]) -> Iterator[Members | SampleError]:
    """Applies ``read`` to each row's reference; what it refuses becomes that row's reason."""
    for row in rows:
        if isinstance(row.reference, SampleError):
            yield row.reference
            continue
        try:
            yield read(row.reference)
        except SampleError as error:
            yield error
