"""Convert a source to shards, indexes and a manifest, in several processes; an interrupted ingest can be resumed.

    source --chunks of rows--> readers and encoders --samples in order--> ShardWriter --> NAME-00000.tar + .index ...
                                                     \\--skipped rows--> NAME.skipped.jsonl        --> NAME.manifest

Worker processes read, check and encode the rows; this process writes the shards. It gets the samples in the order of
the source, so neither the number of workers nor an interruption changes a byte of the result.

A shard is finished once it has its index. A resumed ingest counts the samples of the finished shards and the skipped
rows before them, and continues with the next row. ``NAME.ingest.json`` records the source and the options until the
ingest is complete.
"""

from __future__ import annotations

import itertools
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
from data_pipeline.prepare.rows import RowReader, RowSource, SourceRow, row_name
from data_pipeline.prepare.skipped import SkippedRow, SkippedRowLog, last_stored_row, read_skipped
from data_pipeline.prepare.sources import open_source
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.orphans import Orphans, orphans_of
from data_pipeline.shards.writer import EncodedSample, ShardWriter, encode_sample, shard_name
from data_pipeline.storage.location import local_path

_BATCH_BYTES = 8 << 20
"""A worker returns its samples in batches of about this size."""


@dataclass
class IngestReport:
    """Result of an ingest.

    Attributes:
        manifest: The manifest that was written.
        num_samples: Samples in the manifest.
        num_shards: Shards in the manifest.
        num_resumed: Samples that an earlier, interrupted ingest had already stored.
        num_skipped: Skipped rows.
        skipped: File with each skipped row and the reason; None if no row was skipped.
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
    source: str | Path | RowSource,
    output: str | Path,
    name: str,
    *,
    max_bytes: int = 256 << 20,
    max_samples: int = 10_000,
    max_side: int | None = None,
    workers: int = 0,
    on_error: OnError = OnError.FAIL,
    image_tokenizer: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Store a source as shards ``output/NAME-*.tar`` and write ``output/NAME.manifest``.

    Args:
        source: An opened source, or a path, which is opened with ``open_source`` and its default options.
        output: Folder for the shards; created if missing.
        name: Prefix of the shards and name of the manifest.
        max_bytes: Largest size of a shard, bytes. A larger sample gets a shard of its own.
        max_samples: Largest number of samples in a shard.
        max_side: Largest side of an image, pixels; larger images are scaled down and encoded again. None changes none.
        workers: Number of processes that read, check and encode; 0 works in this one. The result does not depend on it.
        on_error: Whether an unusable row ends the ingest or is skipped.
        image_tokenizer: SHA-256 of the image tokenizer of the rows' token grids, for the manifest; None without grids.
        progress: Called with the number of rows done since the last call.

    Raises:
        DataConfigError: the source cannot be read, no row is usable, the manifest exists already, or unfinished shards
            belong to another source or other options.
        SampleError: a row is unusable and ``on_error`` is ``fail``; the error names the row.
        ShardError: two samples of one shard have the same key, or there are no shard numbers left.
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
    skipped_path = output / f"{name}.skipped.jsonl"
    chunks, last_row = _remaining_chunks(rows, done, skipped_path, report)
    if progress is not None:
        progress(last_row)
    with ExitStack() as stack:
        skipped = stack.enter_context(SkippedRowLog(skipped_path, last_row))
        writer = stack.enter_context(
            ShardWriter(output, name, max_bytes=max_bytes, max_samples=max_samples, first_shard=len(done))
        )
        for outcome in _row_outcomes(_Encoder(rows.reader, max_side), chunks, workers):
            if isinstance(outcome.sample, EncodedSample):
                if writer.is_full_for(outcome.sample):
                    skipped.sync()  # A resumed ingest does not read the rows before a finished shard again.
                writer.add(outcome.sample)
            elif on_error is OnError.FAIL:
                raise SampleError(
                    outcome.sample, shard=rows.description, key=row_name(outcome.row.number, outcome.row.key)
                )
            else:
                skipped.add(SkippedRow(outcome.row.number, outcome.row.key, outcome.sample))
            if progress is not None:
                progress(1)
        skipped.sync()
    shards = [*done, *writer.shards]
    if not shards:
        first = next(read_skipped(skipped.publish()), None)
        example = f", {row_name(first.row, first.key)} because: {first.reason}" if first else ""
        raise DataConfigError(f"{rows.description}: not one usable row; {skipped.count} were skipped{example}")
    for shard in shards:
        report.orphans = report.orphans.plus(orphans_of(ShardIndex.open(shard)))
    report.skipped, report.num_skipped = skipped.publish(), skipped.count
    # The manifest is last: where it exists, the log of skipped rows is complete, too.
    manifest = write_manifest(report.manifest, shards, image_tokenizer)
    plan.unlink()
    report.num_samples, report.num_shards = manifest.num_samples, manifest.num_shards
    return report


class _RowOutcome(NamedTuple):
    row: SourceRow
    sample: EncodedSample | str
    """The encoded sample, or the reason why the row is unusable."""


@dataclass(frozen=True)
class _Encoder:
    """Task of a worker process: read, check and encode a chunk of rows, and yield the outcomes in batches."""

    reader: RowReader
    max_side: int | None

    def __call__(self, rows: Sequence[SourceRow]) -> Iterator[list[_RowOutcome]]:
        batch, size = list[_RowOutcome](), 0
        for row, members in zip(rows, self.reader.read(rows), strict=True):
            # Drop the reference: it may hold a whole record, and the main process does not need it.
            outcome = _RowOutcome(SourceRow(row.number, row.key, None), self._encoded(row, members))
            batch.append(outcome)
            size += len(outcome.sample.data) if isinstance(outcome.sample, EncodedSample) else 0
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _encoded(self, row: SourceRow, members: dict[str, bytes] | SampleError) -> EncodedSample | str:
        if isinstance(members, SampleError):
            return members.reason
        try:
            if self.max_side is not None:
                from data_pipeline.prepare.shrink_images import shrink  # Importing torch takes a second.

                members = shrink(members, self.max_side)
            return encode_sample(row.key, members)
        except SampleError as error:
            return error.reason
        except ShardError as error:  # The key or an extension cannot be a name in a tar.
            return str(error)


def _row_outcomes(work: _Encoder, chunks: Iterator[Sequence[SourceRow]], workers: int) -> Iterator[_RowOutcome]:
    for batch in in_order(work, chunks, workers):
        yield from batch


def resume(plan: Path, output: Path, name: str, options: dict[str, object]) -> list[Path]:
    """Return the shards that an interrupted ingest with the same options finished, and write ``plan``.

    Args:
        plan: File that records the options of an unfinished ingest.
        output: Folder of the shards; created if missing.
        name: Prefix of the shards.
        options: Digest of the source, and options that change the shards. They must equal those in ``plan``.

    Raises:
        DataConfigError: the shards in ``output`` belong to another ingest, or to no unfinished one.
    """
    wanted = json.dumps(options, indent=1) + "\n"
    done = list(_finished(output, name))
    if done and not plan.exists():
        raise DataConfigError(f"{done[0]} exists and belongs to no unfinished ingest; remove it or choose another name")
    if done and not holds(plan, wanted.encode()):
        raise DataConfigError(
            f"{plan}: an unfinished ingest of another source or with other sizes; "
            f"finish that ingest, or remove {name}-*.tar, or choose another name"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_whole(plan, wanted.encode())
    return done


def _finished(output: Path, name: str) -> Iterator[Path]:
    number = 0
    while (shard := output / shard_name(name, number)).exists():
        try:
            ShardIndex.open(shard)
        except ManifestError:  # The ingest died before it wrote the index; the shard is written again.
            return
        yield shard
        number += 1


def _remaining_chunks(
    source: RowSource, done: list[Path], skipped_path: Path, report: IngestReport
) -> tuple[Iterator[Sequence[SourceRow]], int]:
    """Return the chunks of rows after the stored ones, and the number of the last stored row (0 for none).

    Rows are listed, not read.

    Raises:
        DataConfigError: the last stored sample does not have the key of its row: the source has changed.
    """
    chunks = source.chunks()
    if not done:
        return chunks, 0
    report.num_resumed = sum(len(ShardIndex.open(shard)) for shard in done)
    last_row = last_stored_row(skipped_path, report.num_resumed)
    last = ShardIndex.open(done[-1])
    last_key = last.row(len(last) - 1).key
    for chunk in chunks:
        position = last_row - chunk[0].number
        if position < len(chunk):
            if chunk[position].key != last_key:
                break
            rest = chunk[position + 1 :]
            return itertools.chain([rest] if rest else [], chunks), last_row
    raise DataConfigError(
        f"{done[-1]}: ends with the key {last_key!r}, row {last_row} of the source has another: "
        "remove the unfinished shards and start again"
    )
