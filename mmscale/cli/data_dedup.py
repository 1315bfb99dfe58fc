"""``mmscale data dedup``: list duplicate samples within and across data sets."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import typer

from data_pipeline.prepare.choices import KeepRule
from mmscale.cli.console import emit, progress

if TYPE_CHECKING:
    from data_pipeline.prepare.dedup.find import NamedSet

app = typer.Typer()


@app.command(epilog="Example: mmscale data dedup examples/emoji/shards/train.manifest --out duplicates.jsonl")
def dedup(
    manifests: list[str] = typer.Argument(
        help="Manifests to search. NAME is the data set's name in data.datasets; by default the file's stem.",
        metavar="[NAME=]MANIFEST...",
    ),
    out: Path = typer.Option(..., "--out", help="List to write: one JSON line for each sample to leave out."),
    by: str = typer.Option(
        "exact,perceptual", "--by", help="Criteria, applied in the given order: exact, text, pair, perceptual."
    ),
    distance: int = typer.Option(
        4, "--distance", min=0, max=16, help="Largest number of differing bits, of 64, between perceptual hashes."
    ),
    keep: KeepRule = typer.Option("first", "--keep", help="Which of several duplicates to keep."),
    against: list[str] = typer.Option(
        [],
        "--against",
        help="Evaluation set, kept whole: list samples that duplicate its samples; repeatable.",
        metavar="[NAME=]MANIFEST",
    ),
    signatures: Path | None = typer.Option(
        None, "--signatures", help="Folder for hashes, which later searches reuse; by default OUT.signatures."
    ),
    max_pixels: int = typer.Option(
        89_478_485, "--max-pixels", min=1, help="Images with more pixels are not decoded and not compared."
    ),
    workers: int = typer.Option(
        0, "--workers", "--jobs", min=0, help="Processes; 0 works in this one. The result is the same."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of lines."),
) -> None:
    """List duplicate samples for data.faults.exclude or reshard.

    After an interruption, run the same command to continue.
    """
    from dataclasses import asdict

    from data_pipeline.errors import DataConfigError
    from data_pipeline.prepare.dedup.find import DedupOptions, find_duplicates
    from data_pipeline.prepare.dedup.signatures import Criterion

    try:
        criteria = tuple(Criterion(name.strip()) for name in by.split(","))
    except ValueError:
        known = ", ".join(criterion.value for criterion in Criterion)
        raise DataConfigError(f"--by {by}: expected a list of any of {known}, separated by commas") from None
    sets, held_out = [_named(text) for text in manifests], [_named(text) for text in against]
    with progress("dedup", sum(each.manifest.num_samples for each in [*sets, *held_out])) as meter:
        report = find_duplicates(
            sets,
            out,
            DedupOptions(criteria, distance, keep, max_pixels),
            against=held_out,
            signatures=signatures or out.with_name(out.name + ".signatures"),
            workers=workers,
            progress=meter.advance,
            searching=lambda done, of: meter.advance(0, f"searching: {done} of {of}"),
        )
    results = {
        "list": str(report.output),
        "samples": report.num_samples,
        "against": report.num_against,
        "read_now": report.num_read,
        **{name: asdict(found) for name, found in report.criteria.items()},
        "left_out": report.num_left_out,
        "stay": report.num_samples - report.num_left_out,
    }
    emit(results, json=json)


def _named(text: str) -> NamedSet:
    from data_pipeline.prepare.dedup.find import NamedSet
    from data_pipeline.shards.manifest import Manifest

    named = re.fullmatch(r"([A-Za-z0-9_.-]+)=(.+)", text)
    location = named[2] if named else text
    return NamedSet(named[1] if named else PurePosixPath(location).stem, Manifest.open(location))
