"""Change stored samples with a program that computes a whole chunk at a time, as a source for new shards.

    rows of ``reshard`` --chunk of rows--> members --program--> members --> ``ingest``

A chunk is always computed as a whole, even if a resumed ingest needs only its last rows. The batches of the program
therefore depend on the source alone, and neither the number of processes nor an interruption changes a bit of the
result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.errors import SampleError
from data_pipeline.prepare.reshard import ReshardSource
from data_pipeline.prepare.rows import Members, RowReader, SourceRow


class ChunkProgram(Protocol):
    """Changes the samples of a chunk. Every worker process gets a pickled copy, so load weights in the first call.

    Equal chunks must give equal results in every process.
    """

    def __call__(self, samples: Sequence[Members | SampleError], first: int) -> list[Members | SampleError]:
        """Return the new members of each sample in order, or the error that makes it unusable.

        Args:
            samples: The samples of one chunk.
            first: Number of the first one in the source, from 1.
        """


class ComputedSource:
    """Stored samples after a ``ChunkProgram``: a ``RowSource``.

    Args:
        samples: The samples.
        program: Changes them.
        settings: Text that differs whenever the program gives other results.
        description: What the program does, a few words for the user.
    """

    def __init__(self, samples: ReshardSource, program: ChunkProgram, settings: str, description: str) -> None:
        self._samples = samples
        self.reader: RowReader = _ChunkReader(samples.reader, program)
        self._digest = hashlib.sha256(f"{samples.digest()} {settings}".encode()).hexdigest()
        self.description = f"{samples.description}, {description}"

    def chunks(self) -> Iterator[Sequence[SourceRow]]:
        for chunk in self._samples.chunks():
            whole = tuple(chunk)
            yield [SourceRow(row.number, row.key, (whole, position)) for position, row in enumerate(whole)]

    def count(self) -> int | None:
        return self._samples.count()

    def digest(self) -> str:
        return self._digest


@dataclass
class _ChunkReader:
    """Reads the samples of a chunk and runs the program on them."""

    source: RowReader
    program: ChunkProgram

    def read(self, rows: Sequence[SourceRow]) -> Iterator[Members | SampleError]:
        chunk, first = rows[0].reference  # The rows of one chunk, consecutive.
        yield from self.program(list(self.source.read(chunk)), chunk[0].number)[first : first + len(rows)]
