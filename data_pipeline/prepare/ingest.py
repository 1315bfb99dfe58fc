"""A source to shards, indexes and a manifest, in several processes; killed and started again, it goes on.

    source --runs of rows--> readers and encoders --samples in order--> ShardWriter --> NAME-00000.tar + .index ...
                                                   \\--rows left out--> NAME.skipped.jsonl       --> NAME.manifest

Processes read, check and encode; this one cuts, and since it gets samples in the order of the source, neither their
number nor an interruption changes a byte of the result. A shard counts as done once it has its index. The samples in
finished shards and the rows noted as skipped before them say which row comes next. While it runs, ``NAME.ingest.json``
remembers which source and which options the shards belong to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import DataConfigError, ManifestError, SampleError, ShardError
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.checksums import holds
from data_pipeline.io.ordered_pool import in_order
from data_pipeline.prepare.choices import OnError
from data_pipeline.prepare.rows import Row, RowReader, Source
from data_pipeline.prepare.skipped import SkippedRow, SkippedRows, read_skipped, row_of_stored
from data_pipeline.prepare.sources import open_source
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.orphans import Orphans, orphans_of
from data_pipeline.shards.writer import EncodedSample, ShardWriter, encode_sample, shard_name
from data_pipeline.storage.location import local_path

_PIECE_BYTES = 8 << 20
"""Samples are handed over in pieces of about this size."""


@dataclass
class IngestReport:
    """What an ingest did.

    Attributes:
        manifest: The file that was written.
        num_samples: Samples in it.
        num_shards: Shards in it.
        num_resumed: Samples that an earlier, interrupted ingest had already stored.
        num_skipped: Rows left out.
        skipped: File that names each of them, with the reason; None if there are none.
        orphans: Samples without an image or without a text.
    """

    manifest: Path
    num_samples: int = 0
    num_shards: int = 0
    num_resumed: int = 0
    num_skipped: int = 0
    skipped: Path | None = None
    orphans: Orphans = field(default_factory=Orphans)


def ingest(
    source: str | Path | Source,
    output: str | Path,
    name: str,
    *,
    max_bytes: int = 256 << 20,
    max_samples: int = 10_000,
    max_side: int | None = None,
    workers: int = 0,
    on_error: OnError = OnError.FAIL,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Stores a source as shards ``output/NAME-*.tar`` and writes ``output/NAME.manifest``.

    Args:
        source: A path, read as ``open_source`` does by itself, or an opened source.
        output: Folder for the shards; made if missing.
        name: Prefix of the shards and name of the manifest.
        max_bytes: Largest shard, bytes.
        max_samples: Most samples in a shard.
        max_side: Images with a longer side, in pixels, are scaled down to it and encoded again; None keeps all bytes.
        workers: Processes that read, check and encode; 0: this one. The result does not depend on it.
        on_error: What an unusable row does.
        progress: Called with the number of rows done since the last call.

    Raises:
        DataConfigError: the source cannot be read, the manifest exists already, or unfinished shards belong to another
            source or other options.
        SampleError: a row cannot be used and ``on_error`` is ``fail``; names the row.
        WorkerError: a process died; finished shards stay.
        OSError: the disk is full; finished shards stay, the unfinished one is removed.
    """
    output = local_path(output, "ingest writes")
    rows = open_source(source) if isinstance(source, str | Path) else source
    report = IngestReport(output / f"{name}.manifest")
    if report.manifest.exists():
        raise DataConfigError(f"{report.manifest} exists already; remove it and its shards, or choose another name")
    plan = output / f"{name}.ingest.json"
    options = {"source": rows.digest(), "max_bytes": max_bytes, "max_samples": max_samples, "max_side": max_side}
    done = resume(plan, output, name, options)
    list_of_skipped = output / f"{name}.skipped.jsonl"
    spans, last_row = _rows_left(rows, done, list_of_skipped, report)
    if progress is not None:
        progress(last_row)
    with ExitStack() as stack:
        skipped = stack.enter_context(SkippedRows(list_of_skipped, last_row))
        writer = stack.enter_context(
            ShardWriter(output, name, max_bytes=max_bytes, max_samples=max_samples, first_shard=len(done))
        )
        for outcome in _outcomes(_Encoder(rows.reader, max_side), spans, workers):
            if isinstance(outcome.sample, EncodedSample):
                if writer.is_full_for(outcome.sample):
                    skipped.sync()  # What lies before a finished shard is never looked at again.
                writer.add(outcome.sample)
            elif on_error is OnError.FAIL:
                raise SampleError(outcome.sample, shard=rows.description, key=f"row {outcome.row.number}")
            else:
                skipped.add(SkippedRow(outcome.row.number, outcome.row.key, outcome.sample))
            if progress is not None:
                progress(1)
        skipped.sync()
    shards = [*done, *writer.shards]
    if not shards:
        first = next(read_skipped(skipped.publish()), None)
        why = f", row {first.row} for: {first.reason}" if first else ""
        raise DataConfigError(f"{rows.description}: not one usable row; {skipped.count} were skipped{why}")
    manifest = write_manifest(report.manifest, shards)
    for shard in shards:
        report.orphans = report.orphans.plus(orphans_of(ShardIndex.open(shard)))
    report.skipped, report.num_skipped = skipped.publish(), skipped.count
    plan.unlink()
    report.num_samples, report.num_shards = manifest.num_samples, manifest.num_shards
    return report


class _Outcome(NamedTuple):
    row: Row
    sample: EncodedSample | str
    """The sample, or why there is none."""


@dataclass(frozen=True)
class _Encoder:
    """What a process does with a run of rows."""

    reader: RowReader
    max_side: int | None

    def __call__(self, rows: Sequence[Row]) -> Iterator[list[_Outcome]]:
        piece, size = list[_Outcome](), 0
        for row, members in zip(rows, self.reader.read(rows), strict=True):
            # The reference may hold a whole record; it has served.
            outcome = _Outcome(Row(row.number, row.key, None), self._encoded(row, members))
            piece.append(outcome)
            size += len(outcome.sample.data) if isinstance(outcome.sample, EncodedSample) else 0
            if size >= _PIECE_BYTES:
                yield piece
                piece, size = [], 0
        yield piece

    def _encoded(self, row: Row, members: dict[str, bytes] | SampleError) -> EncodedSample | str:
        if isinstance(members, SampleError):
            return members.reason
        try:
            if self.max_side is not None:
                from data_pipeline.prepare.shrink_images import shrink  # torch takes a second to load.

                members = shrink(members, self.max_side)
            return encode_sample(row.key, members)
        except SampleError as error:
            return error.reason
        except ShardError as error:  # A name that no tar may hold.
            return str(error)


def _outcomes(work: _Encoder, spans: Iterator[Sequence[Row]], workers: int) -> Iterator[_Outcome]:
    for piece in in_order(work, spans, workers):
        yield from piece


def resume(plan: Path, output: Path, name: str, options: dict[str, object]) -> list[Path]:
    """Shards that an interrupted run with the same options finished; notes the options for the next time.

    Raises:
        DataConfigError: there are shards that belong to another run, or to none.
    """
    wanted = json.dumps(options, indent=1) + "\n"
    done = list(_finished(output, name))
    if done and not plan.exists():
        raise DataConfigError(f"{done[0]} exists and belongs to no unfinished ingest; remove it or choose another name")
    if done and not holds(plan, wanted.encode()):
        raise DataConfigError(
            f"{plan}: an unfinished ingest of another source or with other sizes; "
            f"finish that one, or remove {name}-*.tar, or choose another name"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_whole(plan, wanted.encode())
    return done


def _finished(output: Path, name: str) -> Iterator[Path]:
    number = 0
    while (shard := output / shard_name(name, number)).exists():
        try:
            ShardIndex.open(shard)
        except ManifestError:  # Named but not yet indexed when the ingest died: it is written again.
            return
        yield shard
        number += 1


def _rows_left(
    source: Source, done: list[Path], list_of_skipped: Path, report: IngestReport
) -> tuple[Iterator[Sequence[Row]], int]:
    """Runs of rows behind the stored ones, and the number of the last stored row. Lists rows, reads none."""
    spans = source.spans()
    if not done:
        return spans, 0
    report.num_resumed = sum(len(ShardIndex.open(shard)) for shard in done)
    last_row = row_of_stored(list_of_skipped, report.num_resumed)
    last = ShardIndex.open(done[-1])
    last_key = last.row(len(last) - 1).key
    for span in spans:
        place = last_row - span[0].number
        if place < len(span):
            if span[place].key != last_key:
                break
            return _chained(span[place + 1 :], spans), last_row
    raise DataConfigError(
        f"{done[-1]}: ends with the key {last_key!r}, row {last_row} of the source has another: "
        "remove the unfinished shards and start again"
    )


def _chained(first: Sequence[Row], rest: Iterator[Sequence[Row]]) -> Iterator[Sequence[Row]]:
    if first:
        yield first
    yield from rest
