"""``mmscale data ingest``, ``reshard`` and ``export``: samples into shards, other shards, and out again."""

from __future__ import annotations

import itertools
import re
from enum import Enum
from pathlib import Path

import typer

from mmscale.cli.console import console, emit, progress

app = typer.Typer()

_JSON = typer.Option(False, "--json", help="One JSON object instead of lines.")
_SHOWN = 20
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", re.IGNORECASE)


def _bytes_of(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise typer.BadParameter(f"{text!r}: expected a size such as 256M, 1G or 500000")
    return size


_JOBS = typer.Option(1, "--jobs", "-j", min=1, help="Processes; the result is the same for any number.")
_SHARD_SIZE = typer.Option("256M", "--shard-size", parser=_bytes_of, metavar="SIZE", help="Largest shard: 256M, 1G.")
_SHARD_SAMPLES = typer.Option(10_000, "--shard-samples", min=1, help="Most samples in a shard.")


class OnErrorChoice(str, Enum):
    """What a row that cannot be used does."""

    FAIL = "fail"
    SKIP = "skip"


class KindChoice(str, Enum):
    """Kinds of sources."""

    AUTO = "auto"
    FOLDER = "folder"
    CLASSES = "classes"
    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    WEBDATASET = "webdataset"
    IMG2DATASET = "img2dataset"
    ENERGON = "energon"
    OBELICS = "obelics"
    MMC4 = "mmc4"


@app.command(epilog="Example: mmscale data ingest pairs.csv --output shards --name pairs --jobs 8")
def ingest(
    source: Path = typer.Argument(help="A folder of images and texts, a .csv, .tsv, .jsonl or .parquet, or tars."),
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    name: str = typer.Option("data", "--name", help="Prefix of the shards and name of the manifest."),
    kind: KindChoice = typer.Option("auto", "--from", help="What the source is; auto looks and says so."),
    columns: list[str] = typer.Option([], "--column", help="Call column OLD NEW.", metavar="NEW=OLD"),
    drop: list[str] = typer.Option([], "--drop", help="Leave a column out.", metavar="COLUMN"),
    images: Path | None = typer.Option(
        None, "--images", file_okay=False, exists=True, help="Folder of the images that a list or Parquet names."
    ),
    split: str = typer.Option("train", "--split", help="Which split of an Energon folder."),
    shard_size: int = _SHARD_SIZE,
    shard_samples: int = _SHARD_SAMPLES,
    max_side: int | None = typer.Option(
        None, "--max-side", min=1, help="Scale images with a longer side down to it, pixels; bytes are kept without."
    ),
    jobs: int = _JOBS,
    on_error: OnErrorChoice = typer.Option("fail", "--on-error", help="What a row that cannot be used does."),
    json: bool = _JSON,
) -> None:
    """Store a folder, a list, Parquet or foreign tars as shards. Interrupted, the same command goes on."""
    from data_pipeline.shards.ingest import OnError
    from data_pipeline.shards.ingest import ingest as run
    from data_pipeline.shards.records import FieldNames
    from data_pipeline.shards.skipped import read_skipped
    from data_pipeline.shards.sources import SourceKind, SourceOptions, open_source

    names = FieldNames(tuple(map(_pair, columns)), tuple(drop))
    opened = open_source(source, SourceOptions(SourceKind(kind.value), names, split, images))
    console.print(f"{source}: {opened.description}", markup=False)
    with progress("ingest", opened.count()) as meter:
        report = run(
            opened,
            output,
            name,
            max_bytes=shard_size,
            max_samples=shard_samples,
            max_side=max_side,
            workers=jobs if jobs > 1 else 0,
            on_error=OnError(on_error.value),
            progress=meter.advance,
        )
    for row in itertools.islice(read_skipped(report.skipped), _SHOWN):
        console.print(f"skipped row {row.row}: {row.reason}", markup=False)
    if report.num_skipped > _SHOWN:
        console.print(f"... and {report.num_skipped - _SHOWN} rows more, all of them in {report.skipped}")
    figures = {
        "source": opened.description,
        "manifest": str(report.manifest),
        "samples": report.num_samples,
        "shards": report.num_shards,
        "resumed_samples": report.num_resumed,
        "skipped": report.num_skipped,
    }
    emit(figures | ({"skipped_rows": str(report.skipped)} if report.skipped else {}), json=json)


def _pair(text: str) -> tuple[str, str]:
    new, equals, old = text.partition("=")
    if not equals or not new or not old:
        raise typer.BadParameter(f"{text!r}: expected NEW=OLD, for example caption=TEXT", param_hint="--column")
    return new, old
