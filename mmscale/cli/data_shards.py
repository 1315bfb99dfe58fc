"""``mmscale data ingest``, ``reshard`` and ``export``: samples into shards, other shards, and out again."""

from __future__ import annotations

import itertools
from enum import Enum
from pathlib import Path

import typer

from mmscale.cli.console import console, emit, progress

app = typer.Typer()

_JSON = typer.Option(False, "--json", help="One JSON object instead of lines.")
_WORKERS = typer.Option(0, "--workers", min=0, help="Processes; 0 works in this one. The result is the same.")
_MEGABYTES = typer.Option(256, "--max-megabytes", min=0.001, help="Largest shard, MiB.")
_SAMPLES = typer.Option(10_000, "--max-samples", min=1, help="Most samples in a shard.")
_SHOWN = 20


class OnErrorChoice(str, Enum):
    """What a row that cannot be used does."""

    FAIL = "fail"
    SKIP = "skip"


class KindChoice(str, Enum):
    """Kinds of sources."""

    AUTO = "auto"
    FOLDER = "folder"
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    WEBDATASET = "webdataset"
    IMG2DATASET = "img2dataset"
    ENERGON = "energon"
    OBELICS = "obelics"
    MMC4 = "mmc4"


@app.command(epilog="Example: mmscale data ingest pairs.csv --output shards --name pairs --workers 8")
def ingest(
    source: Path = typer.Argument(help="A folder of images and texts, a .csv, .jsonl or .parquet, or tars."),
    output: Path = typer.Option(..., "--output", help="Folder for shards, indexes and manifest."),
    name: str = typer.Option("data", "--name", help="Prefix of the shards and name of the manifest."),
    kind: KindChoice = typer.Option("auto", "--from", help="What the source is; auto looks and says so."),
    columns: list[str] = typer.Option([], "--column", help="Call column OLD NEW.", metavar="NEW=OLD"),
    drop: list[str] = typer.Option([], "--drop", help="Leave a column out.", metavar="COLUMN"),
    split: str = typer.Option("train", "--split", help="Which split of an Energon folder."),
    max_megabytes: float = _MEGABYTES,
    max_samples: int = _SAMPLES,
    max_side: int | None = typer.Option(
        None, "--max-side", min=1, help="Scale images with a longer side down to it, pixels; bytes are kept without."
    ),
    workers: int = _WORKERS,
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
    opened = open_source(source, SourceOptions(SourceKind(kind.value), names, split))
    console.print(f"{source}: {opened.description}", markup=False)
    with progress("ingest", opened.count()) as meter:
        report = run(
            opened,
            output,
            name,
            max_bytes=int(max_megabytes * 2**20),
            max_samples=max_samples,
            max_side=max_side,
            workers=workers,
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
