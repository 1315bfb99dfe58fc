"""``mmscale data stats``: statistics of a data set as a table, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import console, emit, print_table, printable, progress

if TYPE_CHECKING:
    from data_pipeline.prepare.stats.count import ManifestLocation, Training
    from data_pipeline.text.tokenizer import TokenizerConfig

app = typer.Typer()

_COLUMNS = ("count", "mean", "min", "p05", "median", "p95", "p99", "max")
_SHOWN_NAMES = 12


@app.command(epilog="Example: mmscale data stats configs/quickstart.yaml --html stats.html")
def stats(
    target: str = typer.Argument(help="A manifest (a file or a URL), or a run's YAML file.", metavar="MANIFEST|CONFIG"),
    overrides: list[str] = typer.Argument(None, help="Values that override the file's.", metavar="[KEY=VALUE]..."),
    tokenizer: Path | None = typer.Option(
        None, "--tokenizer", help="A .model or tokenizer.json for counting tokens; only with a MANIFEST."
    ),
    sample: int | None = typer.Option(
        None, "--sample", min=1, help="Count only this many samples of each data set, spread evenly; by default all."
    ),
    html: Path | None = typer.Option(None, "--html", help="Write a page with histograms and samples."),
    workers: int = typer.Option(
        0, "--workers", "--jobs", min=0, help="Processes; 0 works in this one. The result is the same."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of a table."),
) -> None:
    """Compute statistics of a data set.

    Counts lengths, sizes, aspect ratios, languages, copies and, with a CONFIG, tokens and cost of documents. Reads the
    indexes and the texts; no image is decoded.
    """
    from data_pipeline.prepare.stats.count import count

    subjects = _subjects(target, overrides or [], tokenizer)
    statistics = {}
    for subject in subjects:
        with progress(f"stats {subject.name}", _total(subject.manifest, sample)) as meter:
            statistics[subject.name] = count(
                subject.manifest,
                tokenizer=subject.tokenizer,
                training=subject.training,
                sample=sample,
                workers=workers,
                progress=meter.advance,
            )
    if html is not None:
        from mmscale.report.data_page import write_page

        write_page(html, target, [(each.name, each.manifest.open(), statistics[each.name]) for each in subjects])
        console.print(f"wrote {html}", markup=False)
    summary = {s.name: {"manifest": str(s.manifest.location), **statistics[s.name].summary} for s in subjects}
    if json:
        of_config = {"config": target, "datasets": summary}
        emit(of_config if _is_config(target) else summary[subjects[0].name], json=True)
        return
    for name, each in summary.items():
        _print_statistics(name, each)


@dataclass(frozen=True)
class _Subject:
    """One data set to count."""

    name: str
    manifest: ManifestLocation
    tokenizer: TokenizerConfig | None
    training: Training | None = None


def _is_config(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _subjects(target: str, overrides: list[str], tokenizer: Path | None) -> list[_Subject]:
    from data_pipeline.errors import DataConfigError
    from data_pipeline.prepare.stats.count import ManifestLocation, Training
    from data_pipeline.storage.location import Url, parse_location

    if not _is_config(target):
        if overrides:
            raise DataConfigError(f"{overrides[0]}: a manifest has no values to override; name a .yaml file for that")
        name = PurePosixPath(target).stem
        return [
            _Subject(
                name, ManifestLocation(parse_location(target)), None if tokenizer is None else _tokenizer(tokenizer)
            )
        ]
    if tokenizer is not None:
        raise DataConfigError(f"{target}: names its tokenizer; use data.tokenizer.path={tokenizer} instead")
    from mmscale.config import load
    from mmscale.run.config import RunConfig

    value = load(Path(target), overrides, RunConfig).value
    data = value.data
    return [
        _Subject(
            each.name,
            ManifestLocation(each.indexed, data.storage, data.cache)
            if isinstance(each.indexed, Url)
            else ManifestLocation(each.indexed),
            data.tokenizer,
            Training(each, value.media_spec, data.packing.max_tokens),
        )
        for each in data.datasets
    ]


def _tokenizer(path: Path) -> TokenizerConfig:
    from data_pipeline.text.tokenizer import HuggingFaceTokenizerConfig, SentencePieceTokenizerConfig

    return HuggingFaceTokenizerConfig(path=path) if path.suffix == ".json" else SentencePieceTokenizerConfig(path=path)


def _total(manifest: ManifestLocation, sample: int | None) -> int:
    num_samples = manifest.open().num_samples
    return num_samples if sample is None else min(sample, num_samples)


def _print_statistics(name: str, summary: Mapping[str, Any]) -> None:
    """Print totals, one row per distribution, then the counts by name."""
    lines = [
        f"{name}: {summary['samples']:,} samples in {summary['shards']:,} shards, {summary['bytes'] / 1e6:,.1f} MB"
    ]
    if summary["share_error_95"]:
        lines.append(
            f"looked at {summary['looked_at']:,} of them: shares and ranks of quantiles are right to "
            f"{summary['share_error_95']:.1%} with 95 % certainty"
        )
    print("\n".join(lines))
    print_table([{"": title, **{key: each.get(key) for key in _COLUMNS}} for title, each in _distributions(summary)])
    print("\n".join(_named_counts(summary)))


def _distributions(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    images = summary["images"]
    statistics = {
        "samples per shard": summary["samples_per_shard"],
        "images per sample": images["per_sample"],
        "width, pixels": images.get("width"),
        "height, pixels": images.get("height"),
        "megapixels": images.get("pixels"),
        "width / height": images.get("aspect_ratio"),
        "bytes per image": images.get("bytes"),
        "frames per video": summary.get("videos", {}).get("frames"),
        "seconds per video": summary.get("videos", {}).get("seconds"),
        "seconds per sound": summary.get("sounds", {}).get("seconds"),
        "Hz of a sound": summary.get("sounds", {}).get("rate"),
        "characters per text": summary.get("text_characters"),
        "tokens per text": summary.get("text_tokens"),
        "tokens per document": summary.get("documents", {}).get("tokens"),
        "patches per document": summary.get("documents", {}).get("patches"),
        "cost per document": summary.get("documents", {}).get("cost"),
    }
    for title, each in statistics.items():
        if each and each["count"]:
            million = title == "megapixels"
            yield title, {k: v / 1e6 if million and k != "count" else v for k, v in each.items()}


def _named_counts(summary: Mapping[str, Any]) -> Iterator[str]:
    for title, counts in (
        ("made of", summary["kinds"]),
        ("languages", summary["languages"]),
        ("odd", summary["odd"]),
        ("refused", summary["refused"]),
    ):
        if counts:
            shown = [f"{printable(name)} {number:,}" for name, number in list(counts.items())[:_SHOWN_NAMES]]
            more = len(counts) - len(shown)
            yield f"{title:<10}  " + "   ".join(shown) + (f"   and {more} more" if more else "")
    yield from (f"            {printable(example)}" for example in summary.get("refused_examples", ()))
    if summary["languages"] and not summary["languages_of_one_script_told_apart"]:
        yield "            languages of one script are not distinguished; for that: pip install 'mmscale[stats]'"
    too_long = summary.get("documents", {}).get("longer_than_a_pack")
    if too_long:
        yield f"too long    {too_long:,} documents are longer than data.packing.max_tokens"
    copies = summary.get("copies")
    if copies is None:
        yield "copies      not counted in a sample; mmscale data dedup finds them"
    else:
        about = f" (to {copies['error_95']:.2%})" if copies["error_95"] else ""
        share = f"{copies['share']:.2%}{about}"
        yield f"copies      {copies['images']:,} images, {share}, equal an earlier one by {copies['by']}"
