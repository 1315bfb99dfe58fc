"""``mmscale data ingest``, ``reshard`` and ``export``: write shards from other data, new shards, and plain tars."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_pipeline.prepare.choices import ExportTarget, OnError, SampleKeys, SourceKind, Split, TarNaming
from mmscale.cli.console import console, emit, progress, warn

if TYPE_CHECKING:
    from data_pipeline.prepare.ingest import IngestReport

app = typer.Typer()

JSON = typer.Option(False, "--json", help="Print one JSON object instead of lines.")
_MAX_PRINTED_ROWS = 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", re.IGNORECASE)


def _bytes_of(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise typer.BadParameter(f"{text!r}: expected a size such as 256M, 1G or 500000")
    return size


_DEFAULT_BYTES, _DEFAULT_SAMPLES, _UNLIMITED = 256 << 20, 10_000, 1 << 62
JOBS = typer.Option(1, "--jobs", "-j", min=1, help="Number of processes. The result does not depend on it.")
SHARD_SIZE = typer.Option(
    "256M", "--shard-size", parser=_bytes_of, metavar="SIZE", help="Largest size of a shard: 256M, 1G, or bytes."
)
SHARD_SAMPLES = typer.Option(_DEFAULT_SAMPLES, "--shard-samples", min=1, help="Largest number of samples in a shard.")


@app.command(epilog="Example: mmscale data ingest pairs.csv --output shards --name pairs --jobs 8")
def ingest(
    source: Path = typer.Argument(
        help="A folder of images and texts, a .csv, .tsv, .jsonl, .json, .parquet or .arrow, or tars."
    ),
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    name: str = typer.Option("data", "--name", help="Prefix of the shards and name of the manifest."),
    kind: SourceKind = typer.Option(
        "auto", "--from", help="Format of the source; auto detects it. The detected format is printed."
    ),
    columns: list[str] = typer.Option([], "--column", help="Rename column OLD to NEW; repeatable.", metavar="NEW=OLD"),
    drop: list[str] = typer.Option([], "--drop", help="Leave a column out; repeatable.", metavar="COLUMN"),
    images: Path | None = typer.Option(
        None,
        "--images",
        file_okay=False,
        exists=True,
        help="Folder of the images that a list or Parquet names; by default the folder of the list.",
    ),
    drop_images: bool = typer.Option(
        False, "--drop-images", help="Leave unreadable images out of documents and store their number in the document."
    ),
    split: str = typer.Option("train", "--split", help="Split of an Energon folder to read."),
    shard_size: int = SHARD_SIZE,
    shard_samples: int = SHARD_SAMPLES,
    max_side: int | None = typer.Option(
        None,
        "--max-side",
        min=1,
        help="Scale larger images down to this side, pixels; by default images are unchanged.",
    ),
    jobs: int = JOBS,
    on_error: OnError = typer.Option(
        "fail", "--on-error", help="Whether an unusable row ends the ingest, or is skipped and recorded."
    ),
    json: bool = JSON,
) -> None:
    """Store a folder, a list, Parquet or other tars as shards.

    After an interruption, run the same command to continue.
    """
    from data_pipeline.prepare.ingest import ingest as run
    from data_pipeline.prepare.records import FieldNames
    from data_pipeline.prepare.sources import SourceOptions, open_source, warnings

    names = FieldNames(tuple(map(pair, columns)), tuple(drop))
    opened = open_source(source, SourceOptions(kind, names, split, images, drop_images))
    console.print(f"{source}: {opened.description}", markup=False)
    warn(warnings(source, opened))
    with progress("ingest", opened.count()) as meter:
        report = run(
            opened,
            output,
            name,
            max_bytes=shard_size,
            max_samples=shard_samples,
            max_side=max_side,
            workers=jobs if jobs > 1 else 0,
            on_error=on_error,
            progress=meter.advance,
        )
    show(opened.description, report, json)


@app.command(epilog="Example: mmscale data reshard a.manifest b.manifest --output shards --shard-size 1G --shuffle 1")
def reshard(
    manifests: list[str] = typer.Argument(
        help="Data sets to join, in order. NAME is the data set's name in lists; by default the file's stem.",
        metavar="[NAME=]MANIFEST...",
    ),
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    name: str = typer.Option("data", "--name", help="Prefix of the shards and name of the manifest."),
    shard_size: int | None = typer.Option(
        None,
        "--shard-size",
        parser=_bytes_of,
        metavar="SIZE",
        help="Largest size of a shard: 256M, 1G, or bytes.  [default: 256M]",
    ),
    shard_samples: int | None = typer.Option(
        None, "--shard-samples", min=1, help="Largest number of samples in a shard.  [default: 10000]"
    ),
    shards: int | None = typer.Option(
        None,
        "--shards",
        min=1,
        help="Divide into this many shards of equally many samples (tiny sets: fewer), instead of a shard size.",
    ),
    shuffle: int | None = typer.Option(None, "--shuffle", help="Permute all samples with this seed.", metavar="SEED"),
    exclude: list[Path] = typer.Option(
        [], "--exclude", help="Leave out the samples in this list of dedup or of a quarantine; repeatable."
    ),
    keep: list[Path] = typer.Option([], "--keep", help="Store only the samples in such a list; repeatable."),
    keys: SampleKeys = typer.Option(
        "keep", "--keys", help="Keys of the new samples: unchanged, prefixed by their shard, or numbers."
    ),
    jobs: int = JOBS,
    on_error: OnError = typer.Option(
        "fail", "--on-error", help="Whether a damaged sample ends the command, or is skipped and recorded."
    ),
    json: bool = JSON,
) -> None:
    """Resize, join, filter or shuffle data sets into new shards.

    After an interruption, run the same command to continue.
    """
    from data_pipeline.errors import DataConfigError
    from data_pipeline.prepare.ingest import ingest
    from data_pipeline.prepare.reshard import NamedManifest, ReshardSource, Selection

    if shards is not None and (shard_size is not None or shard_samples is not None):
        raise DataConfigError("--shards sets the size of the shards: leave out --shard-size and --shard-samples")
    pairs = [text.partition("=") if "=" in text else (Path(text).stem, "", text) for text in manifests]
    sets = [NamedManifest(called, Path(path)) for called, _, path in pairs]
    source = ReshardSource(sets, Selection(tuple(exclude), tuple(keep), shuffle, keys))
    console.print(source.description, markup=False)
    with progress("reshard", source.count()) as meter:
        report = ingest(
            source,
            output,
            name,
            max_bytes=shard_size or (_DEFAULT_BYTES if shards is None else _UNLIMITED),
            max_samples=shard_samples or (_DEFAULT_SAMPLES if shards is None else -(-source.count() // shards)),
            workers=jobs if jobs > 1 else 0,
            on_error=on_error,
            image_tokenizer=source.image_tokenizer,
            progress=meter.advance,
        )
    show(source.description, report, json)


@app.command(epilog="Example: mmscale data export shards/data.manifest --output tars --for energon")
def export(
    manifest: Path = typer.Argument(help="A manifest."),
    output: Path = typer.Option(..., "--output", help="Folder for the tars."),
    reader: ExportTarget = typer.Option(
        "webdataset", "--for", help="Program that will read the tars; energon adds the metadata that Energon needs."
    ),
    naming: TarNaming = typer.Option(
        "keep", "--naming", help="Unchanged names, or 00012.tar with 000120345.jpg, .txt and .json."
    ),
    split: Split = typer.Option("train", "--split", help="Energon's split for the data set; for --for energon."),
    jobs: int = JOBS,
    json: bool = JSON,
) -> None:
    """Write a data set as plain tars, without index and manifest.

    After an interruption, run the same command to continue.
    """
    from data_pipeline.prepare.export import export as run
    from data_pipeline.shards.manifest import Manifest

    with progress("export", Manifest.open(manifest).num_samples) as meter:
        report = run(
            manifest,
            output,
            naming=naming,
            reader=reader,
            split=split,
            workers=jobs if jobs > 1 else 0,
            progress=meter.advance,
        )
    results = {
        "folder": str(output),
        "samples": report.num_samples,
        "shards": report.num_shards,
        "resumed_shards": report.num_resumed,
    }
    emit(results | ({"sample_type": report.sample_type} if report.sample_type else {}), json=json)


def show(description: str, report: IngestReport, json: bool, **more: object) -> None:
    """Print the result of an ingest, ``more`` results, and the first skipped rows."""
    from data_pipeline.prepare.rows import row_name
    from data_pipeline.prepare.skipped import read_skipped

    for row in itertools.islice(read_skipped(report.skipped), _MAX_PRINTED_ROWS):
        console.print(f"skipped {row_name(row.row, row.key)}: {row.reason}", markup=False)
    if report.num_skipped > _MAX_PRINTED_ROWS:
        console.print(f"... and {report.num_skipped - _MAX_PRINTED_ROWS} more rows; {report.skipped} lists all of them")
    warn(report.orphans.warnings())
    results = {
        "source": description,
        "manifest": str(report.manifest),
        "samples": report.num_samples,
        "shards": report.num_shards,
        "resumed_samples": report.num_resumed,
        "skipped": report.num_skipped,
        **report.orphans.counts(),
        **more,
    }
    emit(results | ({"skipped_rows": str(report.skipped)} if report.skipped else {}), json=json)


def pair(text: str) -> tuple[str, str]:
    """Parse ``NEW=OLD``, the value of ``--column``; raise ``BadParameter`` if it has another form."""
    new, equals, old = text.partition("=")
    if not equals or not new or not old:
        raise typer.BadParameter(f"{text!r}: expected NEW=OLD, for example caption=TEXT", param_hint="--column")
    return new, old
