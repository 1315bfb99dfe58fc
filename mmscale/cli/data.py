"""``mmscale data``: create, index, verify and describe the shards that training reads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli import (
    data_crops,
    data_dedup,
    data_encode,
    data_pairs,
    data_reference,
    data_shards,
    data_show,
    data_stats,
    data_text,
    data_trace,
)
from mmscale.cli.console import console, emit, progress, track, warn

if TYPE_CHECKING:
    from data_pipeline.shards.index import ShardIndex
    from data_pipeline.storage.location import Url

app = typer.Typer()

_JSON = typer.Option(False, "--json", help="Print one JSON object instead of lines.")


@app.command(epilog="Example: mmscale data index shards/*.tar --manifest shards/all.manifest")
def index(
    shards: list[str] = typer.Argument(
        None, help="Tars to index, or URLs of tars or of a folder in a bucket; by default those of --manifest."
    ),
    manifest: str | None = typer.Option(
        None, "--manifest", help="Manifest of these shards to write or renew: a file, or a URL if the tars have URLs."
    ),
    json: bool = _JSON,
) -> None:
    """Index webdataset tars and write their manifest.

    Each index is written next to its tar.
    """
    from data_pipeline.errors import DataConfigError
    from data_pipeline.shards.index import build_index
    from data_pipeline.shards.manifest import Manifest, write_manifest
    from data_pipeline.shards.orphans import Orphans, orphans_of
    from data_pipeline.storage.location import Url, parse_location

    found, target = [parse_location(shard) for shard in shards or ()], manifest and parse_location(manifest)
    if not found:
        if target is None:
            raise DataConfigError("give tars to index, or a manifest to renew with --manifest")
        old = Manifest.open(target)
        found = [old.shard_location(number) for number in range(old.num_shards)]
    urls, paths = [f for f in found if isinstance(f, Url)], [f for f in found if not isinstance(f, Url)]
    if urls:
        if paths or not isinstance(target, Url | None):
            raise DataConfigError(f"{urls[0]}: tars and manifest must be all on a server or all on this machine")
        emit(_index_remote(urls, target), json=json)
        return
    if isinstance(target, Url):
        raise DataConfigError(f"{target}: tars and manifest must be all on a server or all on this machine")
    orphans = Orphans()
    for shard in track(paths, "index"):
        orphans = orphans.plus(orphans_of(build_index(shard)))
    warn(orphans.warnings())
    results: dict[str, object] = {"shards": len(paths), "samples": orphans.samples, **orphans.counts()}
    if target is not None:
        written = write_manifest(target, paths, _image_tokenizer_of(target))
        results |= {"manifest": str(target), "fingerprint": written.fingerprint}
    emit(results, json=json)


def _image_tokenizer_of(manifest: str | Path) -> str | None:
    """Return the image tokenizer that a manifest names, before it is written again; None if it cannot be read."""
    from data_pipeline.errors import ManifestError
    from data_pipeline.shards.manifest import Manifest

    try:
        return Manifest.open(manifest).image_tokenizer
    except ManifestError:
        return None


def _index_remote(urls: list[Url], manifest: Url | None) -> dict[str, object]:
    from data_pipeline.prepare.remote_index import index_remote, tars_below
    from data_pipeline.shards.orphans import Orphans, orphans_of
    from data_pipeline.storage.storage import Storage

    storage = Storage.of_process()
    tars = [tar for url in urls for tar in tars_below(url, storage)]
    found: list[Orphans] = []
    with progress("index", len(tars)) as meter:

        def record(index: ShardIndex) -> None:
            found.append(orphans_of(index))
            meter.advance(1)

        num_samples, written = index_remote(tars, manifest, storage, record)
    orphans = functools.reduce(Orphans.plus, found, Orphans())
    warn(orphans.warnings())
    results: dict[str, object] = {"shards": len(tars), "samples": num_samples, **orphans.counts()}
    return results | ({"manifest": str(manifest), "fingerprint": written.fingerprint} if written is not None else {})


@app.command(epilog="Example: mmscale data verify examples/emoji/shards/train.manifest --jobs 4")
def verify(
    paths: list[str] = typer.Argument(help="Manifests or tars: files or URLs."),
    max_pixels: int = typer.Option(
        89_478_485, "--max-pixels", min=1, help="Report an image with more pixels as damage, and do not decode it."
    ),
    jobs: int = typer.Option(1, "--jobs", min=1, help="Number of processes; each reads one shard at a time."),
    json: bool = _JSON,
) -> None:
    """Verify whole shards, decode every image, and list every damage. Exit code 1 if there is any beyond warnings."""
    import itertools
    from collections import Counter
    from dataclasses import asdict

    from data_pipeline.prepare.verify import check_manifest, jobs_of
    from data_pipeline.prepare.verify import verify as run
    from data_pipeline.shards.damage import Damage
    from data_pipeline.shards.orphans import Orphans

    damages: list[Damage] = []
    orphans = Orphans()
    results = dict.fromkeys(("shards", "samples", "members", "bytes"), 0)

    def record(found: list[Damage]) -> None:
        damages.extend(found)
        for damage in found if not json else ():
            offset = "-" if damage.offset is None else damage.offset
            location = f"{damage.shard} key={damage.key or '-'} offset={offset}"
            print(f"{location} {damage.problem.value}: {damage.detail}", flush=True)

    plans = [jobs_of(path) for path in paths]
    for path in paths:
        if path.endswith(".manifest"):
            record(check_manifest(path))
    shards = itertools.chain.from_iterable(plan for _, plan in plans)
    with progress("verify", sum(count for count, _ in plans)) as meter:
        for report in run(shards, max_pixels=max_pixels, workers=jobs if jobs > 1 else 0):
            record(report.damages)
            orphans = orphans.plus(report.orphans)
            found = (1, report.num_samples, report.num_members, report.num_bytes)
            results = {name: total + more for (name, total), more in zip(results.items(), found, strict=True)}
            meter.advance(1, report.shard)
    warn(orphans.warnings())
    results |= orphans.counts()
    kinds = Counter(damage.problem.value for damage in damages)
    if json:
        emit({**results, "kinds": kinds, "damages": [asdict(damage) for damage in damages]}, json=True)
    else:
        emit({**results, "damages": {"all": len(damages), **kinds}})
    if not all(damage.problem.is_warning for damage in damages):
        console.print("copy or make the damaged shards again, or leave the samples out of runs: data.faults.exclude")
        raise typer.Exit(1)


@app.command(epilog="Example: mmscale data digest configs/quickstart.yaml --steps 0:10 --world-size 2 --workers 2")
def digest(
    config: Path = typer.Argument(help="A run's YAML file."),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    steps: str = typer.Option("0:10", "--steps", help="Steps from A up to, but not including, B.", metavar="A:B"),
    world_size: int = typer.Option(1, "--world-size", min=1, help="Number of ranks to simulate."),
    workers: int = typer.Option(0, "--workers", min=0, help="Worker processes per rank; 0 loads in this process."),
    resume_at: int | None = typer.Option(
        None, "--resume-at", min=0, help="Step at which the loader is saved and resumed from its state."
    ),
    resume_world_size: int | None = typer.Option(
        None, "--resume-world-size", min=1, help="Number of ranks from --resume-at on; by default unchanged."
    ),
) -> None:
    """Print one line "step sha256" per global batch.

    The lines are equal for every number of ranks and workers.
    """
    from data_pipeline.history.digest import digest as run
    from mmscale.cli.run_file import load_run

    value = load_run(config, overrides or []).value
    chosen = parse_range(steps, "--steps")
    if resume_world_size is not None and resume_at is None:
        raise typer.BadParameter("give the step with --resume-at", param_hint="--resume-world-size")
    resume = (resume_at, resume_world_size)
    for step, checksum in run(value.data, value.media_spec, value.seed, chosen, world_size, workers, *resume):
        print(f"{step} {checksum}", flush=True)


def parse_range(text: str, option: str) -> range:
    """Parse ``A:B``, the value of an option; raise ``BadParameter`` unless 0 <= A <= B."""
    first, colon, end = text.partition(":")
    if not colon or not first.isdigit() or not end.isdigit() or int(end) < int(first):
        raise typer.BadParameter(f"{text!r}: expected A:B with 0 <= A <= B, for example 0:10", param_hint=option)
    return range(int(first), int(end))


app.registered_commands += data_text.app.registered_commands
app.registered_commands += data_shards.app.registered_commands
app.registered_commands += data_encode.app.registered_commands
app.registered_commands += data_pairs.app.registered_commands
app.registered_commands += data_reference.app.registered_commands
app.registered_commands += data_dedup.app.registered_commands
app.registered_commands += data_show.app.registered_commands
app.registered_commands += data_stats.app.registered_commands
app.registered_commands += data_trace.app.registered_commands
app.registered_commands += data_crops.app.registered_commands
