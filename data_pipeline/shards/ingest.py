"""A folder or a list of files to shards, indexes and a manifest; killed and started again, it goes on.

    source --rows--> ShardWriter --> NAME-00000.tar + .index ... --> NAME.manifest

A shard counts as done once it has its index. The last key in the last finished shard says which row comes next, and
since shards are cut by size alone, a resumed ingest ends with the very bytes of an undisturbed one. While it runs,
``NAME.ingest.json`` remembers which source and which options the shards belong to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from data_pipeline.errors import DataConfigError, ManifestError, SampleError
from data_pipeline.shards.files import write_whole
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.sources import Row, Source, open_source
from data_pipeline.shards.writer import ShardWriter, shard_name


class OnError(str, Enum):
    """What a row that cannot be used does."""

    FAIL = "fail"
    """It ends the ingest; finished shards stay."""
    SKIP = "skip"
    """It is left out and reported."""


@dataclass
class IngestReport:
    """What an ingest did.

    Attributes:
        manifest: The file that was written.
        num_samples: Samples in it.
        num_shards: Shards in it.
        num_resumed: Samples that an earlier, interrupted ingest had already stored.
        skipped: (row number from 1, reason) of each row left out.
    """

    manifest: Path
    num_samples: int = 0
    num_shards: int = 0
    num_resumed: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)


def ingest(
    source: str | Path,
    output: str | Path,
    name: str,
    *,
    max_bytes: int = 256 << 20,
    max_samples: int = 10_000,
    on_error: OnError = OnError.FAIL,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Stores a folder, CSV or JSONL as shards ``output/NAME-*.tar`` and writes ``output/NAME.manifest``.

    Args:
        source: A folder (images with same-stem .txt or .json), or a list with path, caption, captions or parts.
        output: Folder for the shards; made if missing.
        name: Prefix of the shards and name of the manifest.
        max_bytes: Largest shard, bytes.
        max_samples: Most samples in a shard.
        on_error: What an unusable row does.
        progress: Called with the number of rows done since the last call.

    Raises:
        DataConfigError: the source cannot be read, the manifest exists already, or unfinished shards belong to another
            source or other options.
        SampleError: a row cannot be used and ``on_error`` is ``fail``; names the row.
        OSError: the disk is full; finished shards stay, the unfinished one is removed.
    """
    output, rows = Path(output), open_source(source)
    report = IngestReport(output / f"{name}.manifest")
    if report.manifest.exists():
        raise DataConfigError(f"{report.manifest} exists already; remove it and its shards, or choose another name")
    plan = output / f"{name}.ingest.json"
    done = _resume(plan, output, name, _plan_of(rows, max_bytes, max_samples))
    with ShardWriter(output, name, max_bytes=max_bytes, max_samples=max_samples, first_shard=len(done)) as writer:
        for row in _rows_left(rows, done, report, progress):
            try:
                members = row.read()
            except SampleError as error:
                if on_error is OnError.FAIL:
                    raise error.located(str(source), f"row {row.number}") from error
                report.skipped.append((row.number, error.reason))
            else:
                writer.write(row.key, members)
            if progress is not None:
                progress(1)
    shards = [*done, *writer.shards]
    if not shards:
        raise DataConfigError(f"{source}: not one usable row; {len(report.skipped)} were skipped")
    manifest = write_manifest(report.manifest, shards)
    plan.unlink()
    report.num_samples, report.num_shards = manifest.num_samples, manifest.num_shards
    return report


def _plan_of(source: Source, max_bytes: int, max_samples: int) -> str:
    options = {"source": source.digest(), "max_bytes": max_bytes, "max_samples": max_samples}
    return json.dumps(options, indent=1) + "\n"


def _resume(plan: Path, output: Path, name: str, wanted: str) -> list[Path]:
    """Shards that an interrupted ingest of the same source finished; notes the plan for the next time."""
    done = list(_finished(output, name))
    if done and not plan.exists():
        raise DataConfigError(f"{done[0]} exists and belongs to no unfinished ingest; remove it or choose another name")
    if done and plan.read_text() != wanted:
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
    source: Source, done: list[Path], report: IngestReport, progress: Callable[[int], None] | None
) -> Iterator[Row]:
    """The rows behind the stored ones. Rows and keys come in one order, so no list of them is held in memory."""
    rows = source.rows()
    keys = (index.key(i) for index in map(ShardIndex.open, done) for i in range(len(index)))
    key = next(keys, None)
    while key is not None:
        row = next(rows, None)
        if row is None:
            raise DataConfigError(f"{done[-1]}: holds the key {key!r}, which the source does not have; remove it")
        if row.key == key:
            report.num_resumed += 1
            key = next(keys, None)
        else:
            report.skipped.append((row.number, "skipped before the interruption"))
        if progress is not None:
            progress(1)
    yield from rows
