"""The page of ``mmscale data stats --html``: histograms, counts and samples of data sets in one file.

Texts, keys and file names come from anywhere: the template escapes all of them, pictures are encoded anew, and the page
forbids itself the network and every script but its own. Not for: counting (``data_pipeline.prepare.stats``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.prepare.stats.count import Counted
from data_pipeline.prepare.stats.gallery import Shown, gallery
from data_pipeline.prepare.stats.histogram import Histogram
from data_pipeline.shards.manifest import Manifest
from mmscale.metrics.format import format_count
from mmscale.report.charts import Chart, histogram_chart
from mmscale.report.page import render_page

_NUM_SAMPLES = 24
_NUM_NAMES = 14


@dataclass(frozen=True)
class Counts:
    """Things by name, most frequent first: (name, number, share of the largest in percent)."""

    title: str
    rows: list[tuple[str, str, float]]
    more: int


@dataclass(frozen=True)
class DataSet:
    """What the page shows of one data set."""

    name: str
    manifest: str
    facts: list[tuple[str, str]]
    sampled: str
    charts: list[Chart]
    constants: list[tuple[str, str]]
    counts: list[Counts]
    examples: list[str]
    samples: list[Shown]


def write_page(path: Path, title: str, sets: Sequence[tuple[str, Manifest, Counted]]) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: The file.
        title: What was counted.
        sets: Name, manifest and figures of each data set.

    Raises:
        ManifestError, ShardError, StorageError: a shard cannot be read.
        OSError: the page cannot be written.
    """
    shown = [_data_set(name, manifest, counted) for name, manifest, counted in sets]
    template = Path(__file__).with_name("data.html.jinja")
    write_whole(path, as_utf8(render_page(template, title=title, sets=shown)), parents=True)


def _data_set(name: str, manifest: Manifest, counted: Counted) -> DataSet:
    figures, error = counted.figures, counted.figures["share_error_95"]
    sampled = ""
    if error:
        sampled = (
            f"Counted in {figures['looked_at']:,} of {figures['samples']:,} samples, spread evenly: shares and ranks "
            f"of quantiles are right to {100 * error:.2g} percentage points with 95 % certainty."
        )
    distributions = [row for row in _distributions(counted) if row[1].count and row[1].largest]
    counts = [
        _counts("Made of", figures["kinds"]),
        _counts("Languages of texts", figures["languages"]),
        _counts("Odd", {name.replace("_", " "): number for name, number in figures["odd"].items()}),
        _counts("Cannot be read or makes no document", figures["refused"]),
        _counts("Files by extension", figures["members"]),
    ]
    return DataSet(
        name=name,
        manifest=str(manifest.path),
        facts=_facts(figures),
        sampled=sampled,
        charts=[
            histogram_chart(title, _note(histogram, text), histogram, text)
            for title, histogram, text in distributions
            if histogram.smallest < histogram.largest
        ],
        constants=[
            (title, text(histogram.largest / histogram.per_unit))
            for title, histogram, text in distributions
            if histogram.smallest == histogram.largest
        ],
        counts=[each for each in counts if each.rows],
        examples=list(figures.get("refused_examples", ())),
        samples=list(gallery(manifest, _NUM_SAMPLES)),
    )


def _facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    documents, copies = figures.get("documents"), figures.get("copies")
    facts = [
        ("samples", f"{figures['samples']:,}"),
        ("shards", f"{figures['shards']:,}"),
        ("size", _bytes(figures["bytes"])),
    ]
    if figures["images"]["count"]:
        facts.append(("images", f"{figures['images']['count']:,}"))
    if "text_characters" in figures:
        facts.append(("texts", f"{figures['text_characters']['count']:,}"))
    if "text_tokens" in figures:
        facts.append(("tokens of text", format_count(figures["text_tokens"]["sum"])))
    if documents is not None:
        facts.append(("tokens of an epoch", format_count(documents["tokens"]["sum"])))
        facts.append(("longer than a pack", f"{documents['longer_than_a_pack']:,}"))
    if copies is not None:
        facts.append(("copies of other images", f"{copies['images']:,} ({copies['share']:.2%})"))
    return facts


def _distributions(counted: Counted) -> list[tuple[str, Histogram, Callable[[float], str]]]:
    tally = counted.tally
    return [
        ("Tokens of a document", tally.documents["tokens"], format_count),
        ("Patches of a document", tally.documents["patches"], format_count),
        ("Cost of a document, in tokens", tally.documents["cost"], format_count),
        ("Tokens of a text", tally.texts["tokens"], format_count),
        ("Characters of a text", tally.texts["characters"], format_count),
        ("Images of a sample", tally.samples["images"], format_count),
        ("Width, pixels", tally.images["width"], _plain),
        ("Height, pixels", tally.images["height"], _plain),
        ("Pixels of an image", tally.images["pixels"], format_count),
        ("Width / height", tally.images["aspect_ratio"], _plain),
        ("Bytes of an image", tally.images["bytes"], format_count),
        ("Samples of a shard", counted.shards, format_count),
    ]


def _note(histogram: Histogram, text: Callable[[float], str]) -> str:
    numbers = (
        histogram.total / histogram.count,
        histogram.quantile(0.5),
        histogram.quantile(0.95),
        histogram.smallest,
        histogram.largest,
    )
    mean, median, p95, low, high = (text(value / histogram.per_unit) for value in numbers)
    return f"mean {mean} · median {median} · p95 {p95} · {low} to {high}"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counts(title: str, counts: Mapping[str, int]) -> Counts:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    largest = max((number for _, number in ordered), default=1)
    rows = [(name, f"{number:,}", 100 * number / largest) for name, number in ordered[:_NUM_NAMES]]
    return Counts(title, rows, len(ordered) - len(rows))


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
