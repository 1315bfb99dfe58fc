"""``mmscale data``: make, index, check and describe the shards that training reads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmscale.cli import data_dedup, data_shards, data_show, data_stats, data_text, data_trace, data_views
from mmscale.cli.console import emit, progress, track, warn

if TYPE_CHECKING:
    from data_pipeline.shards.index import ShardIndex
    from data_pipeline.storage.location import Url

app = typer.Typer()

_JSON = typer.Option(False, "--json", help="One JSON object instead of lines.")


@app.command(epilog="Example: mmscale data index shards/*.tar --manifest shards/all.manifest")
def index(
    shards: list[str] = typer.Argument(
        None, help="Tars to index, or URLs of tars or of a folder in a bucket; with none, those of the manifest."
    ),
    manifest: str | None = typer.Option(
        None, "--manifest", help="Write a manifest of these shards, or renew it: a file, or a URL if they have URLs."
    ),
    json: bool = _JSON,
) -> None:
    """Build the sidecar index of webdataset tars, and a manifest of them, where the tars lie."""
    from data_pipeline.errors import DataConfigError
    from data_pipeline.shards.index import build_index
    from data_pipeline.shards.manifest import Manifest, write_manifest
    from data_pipeline.shards.orphans import Orphans, orphans_of
    from data_pipeline.storage.location import Url, parse_location

    found, target = [parse_location(shard) for shard in shards or ()], manifest and parse_location(manifest)
    if not found:
        if target is None:
            raise DataConfigError("name tars to index, or a manifest to renew with --manifest")
        old = Manifest.open(target)
        found = [old.shard_location(number) for number in range(old.num_shards)]
    urls, paths = [f for f in found if isinstance(f, Url)], [f for f in found if not isinstance(f, Url)]
    if urls:
        if paths or not isinstance(target, Url | None):
            raise DataConfigError(f"{urls[0]}: tars and manifest lie together, all on a server or all on this machine")
        emit(_index_remote(urls, target), json=json)
        return
    if isinstance(target, Url):
        raise DataConfigError(f"{target}: tars and manifest lie together, all on a server or all on this machine")
    orphans = Orphans()
    for shard in track(paths, "index"):
        orphans = orphans.plus(orphans_of(build_index(shard)))
    warn(orphans.warnings())
    figures: dict[str, object] = {"shards": len(paths), "samples": orphans.samples, **orphans.figures()}
    if target is not None:
        written = write_manifest(target, paths)
        figures |= {"manifest": str(target), "fingerprint": written.fingerprint}
    emit(figures, json=json)


def _index_remote(urls: list[Url], manifest: Url | None) -> dict[str, object]:
    from data_pipeline.prepare.remote_index import index_remote, tars_below
    from data_pipeline.shards.orphans import Orphans, orphans_of
    from data_pipeline.storage.storage import Storage

    storage = Storage.of_process()
    tars = [tar for url in urls for tar in tars_below(url, storage)]
    found: list[Orphans] = []
    with progress("index", len(tars)) as meter:

        def note(index: ShardIndex) -> None:
            found.append(orphans_of(index))
            meter.advance(1)

        num_samples, written = index_remote(tars, manifest, storage, note)
    orphans = functools.reduce(Orphans.plus, found, Orphans())
    warn(orphans.warnings())
    figures: dict[str, object] = {"shards": len(tars), "samples": num_samples, **orphans.figures()}
    return figures | ({"manifest": str(manifest), "fingerprint": written.fingerprint} if written is not None else {})


@app.command(epilog="Example: mmscale data verify examples/emoji/shards/train.manifest --jobs 4")
def verify(
    paths: list[str] = typer.Argument(help="Manifests or tars: files or URLs."),
    max_pixels: int = typer.Option(89_478_485, "--max-pixels", min=1, help="An image with more pixels is damage."),
    jobs: int = typer.Option(1, "--jobs", min=1, help="Shards to read at the same time, each in its own process."),
    json: bool = _JSON,
) -> None:
    """Read shards whole, decode every image, and list every damage. Exit code 1 if there is any."""
    import itertools
    from collections import Counter
    from dataclasses import asdict

    from data_pipeline.prepare.verify import check_manifest, jobs_of
    from data_pipeline.prepare.verify import verify as run
    from data_pipeline.shards.damage import Damage
    from data_pipeline.shards.orphans import Orphans

    damages: list[Damage] = []
    orphans = Orphans()
    figures = dict.fromkeys(("shards", "samples", "members", "bytes"), 0)

    def note(found: list[Damage]) -> None:
        damages.extend(found)
        for damage in found if not json else ():
            place = f"{damage.shard} key={damage.key or '-'} offset={'-' if damage.offset is None else damage.offset}"
            print(f"{place} {damage.problem.value}: {damage.detail}", flush=True)

    plans = [jobs_of(path) for path in paths]
    for path in paths:
        if path.endswith(".manifest"):
            note(check_manifest(path))
    shards = itertools.chain.from_iterable(plan for _, plan in plans)
    with progress("verify", sum(count for count, _ in plans)) as meter:
        for report in run(shards, max_pixels=max_pixels, workers=jobs if jobs > 1 else 0):
            note(report.damages)
            orphans = orphans.plus(report.orphans)
            found = (1, report.num_samples, report.num_members, report.num_bytes)
            figures = {name: total + more for (name, total), more in zip(figures.items(), found, strict=True)}
            meter.advance(1, report.shard)
    warn(orphans.warnings())
    figures |= orphans.figures()
    kinds = Counter(damage.problem.value for damage in damages)
    if json:
        emit({**figures, "kinds": kinds, "damages": [asdict(damage) for damage in damages]}, json=True)
    else:
        emit({**figures, "damages": {"all": len(damages), **kinds}})
    if not all(damage.problem.is_warning for damage in damages):
        raise typer.Exit(1)


@app.command(epilog="Example: mmscale data digest configs/quickstart.yaml --steps 0:10 --world-size 2 --workers 2")
def digest(
    config: Path = typer.Argument(help="A run's YAML file."),
    overrides: list[str] = typer.Argument(None, help="Values that win over the file's.", metavar="[KEY=VALUE]..."),
    steps: str = typer.Option("0:10", "--steps", help="Steps A to B, B left out.", metavar="A:B"),
    world_size: int = typer.Option(1, "--world-size", min=1, help="Ranks to play."),
    workers: int = typer.Option(0, "--workers", min=0, help="Worker processes of each rank."),
    resume_at: int | None = typer.Option(None, "--resume-at", min=0, help="Save the loader's state here and go on."),
    resume_world_size: int | None = typer.Option(
        None, "--resume-world-size", min=1, help="Ranks behind --resume-at, if other than before."
    ),
) -> None:
    """Print a line "step sha256" of each global batch: equal for every number of ranks and workers."""
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
    """``A:B`` of an option."""
    first, colon, end = text.partition(":")
    if not colon or not first.isdigit() or not end.isdigit() or int(end) < int(first):
        raise typer.BadParameter(f"{text!r}: expected A:B with 0 <= A <= B, for example 0:10", param_hint=option)
    return range(int(first), int(end))


app.registered_commands += data_text.app.registered_commands
app.registered_commands += data_shards.app.registered_commands
app.registered_commands += data_dedup.app.registered_commands
app.registered_commands += data_show.app.registered_commands
app.registered_commands += data_stats.app.registered_commands
app.registered_commands += data_trace.app.registered_commands
app.registered_commands += data_views.app.registered_commands
