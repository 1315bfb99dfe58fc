"""The page of ``mmscale data stats --html``: histograms, counts and samples of data sets in one file.

Texts, keys and file names are untrusted. The template escapes all of them, images are decoded and encoded again, and
the page's content security policy allows only its own script and no network. Not for: counting
(``data_pipeline.prepare.stats``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.io.atomic import as_utf8, write_whole
from data_pipeline.prepare.stats.count import DatasetStatistics
from data_pipeline.prepare.stats.gallery import GallerySample, gallery
from data_pipeline.prepare.stats.histogram import Histogram
from data_pipeline.shards.manifest import Manifest
from mmscale.metrics.format import format_count
from mmscale.report.charts import Chart, histogram_chart
from mmscale.report.page import render_page

_NUM_SAMPLES = 24
_NUM_NAMES = 14


@dataclass(frozen=True)
class Counts:
    """Counts by name, most frequent first.

    Attributes:
        title: Heading.
        rows: (name, number, percentage of the largest number).
        more: Number of names that are left out.
    """

    title: str
    rows: list[tuple[str, str, float]]
    more: int


@dataclass(frozen=True)
class DataSet:
    """The part of the page about one data set.

    Attributes:
        name: Name of the data set.
        manifest: Path or URL of its manifest.
        facts: (label, value) pairs under the title.
        sampled: A sentence about the accuracy if only a part was counted; else empty.
        charts: Histograms.
        constants: (title, value) of distributions with a single value.
        counts: Counts by name.
        examples: Messages of the first unusable samples.
        samples: Samples to display.
    """

    name: str
    manifest: str
    facts: list[tuple[str, str]]
    sampled: str
    charts: list[Chart]
    constants: list[tuple[str, str]]
    counts: list[Counts]
    examples: list[str]
    samples: list[GallerySample]


def write_page(path: Path, title: str, sets: Sequence[tuple[str, Manifest, DatasetStatistics]]) -> None:
    """Write the page atomically.

    Args:
        path: The file.
        title: Title of the page.
        sets: Name, manifest and statistics of each data set.

    Raises:
        ManifestError, ShardError, StorageError: a shard cannot be read.
        OSError: the page cannot be written.
    """
    data_sets = [_data_set(name, manifest, statistics) for name, manifest, statistics in sets]
    template = Path(__file__).with_name("data.html.jinja")
    write_whole(path, as_utf8(render_page(template, title=title, sets=data_sets)), parents=True)


def _data_set(name: str, manifest: Manifest, statistics: DatasetStatistics) -> DataSet:
    summary, error = statistics.summary, statistics.summary["share_error_95"]
    sampled = ""
    if error:
        sampled = (
            f"Counted in {summary['looked_at']:,} of {summary['samples']:,} samples, spread evenly: shares and ranks "
            f"of quantiles are accurate to {100 * error:.2g} percentage points with 95 % certainty."
        )
    distributions = [row for row in _distributions(statistics) if row[1].count and row[1].largest]
    counts = [
        _counts("Made of", summary["kinds"]),
        _counts("Languages of texts", summary["languages"]),
        _counts("Odd", {name.replace("_", " "): number for name, number in summary["odd"].items()}),
        _counts("Cannot be read or makes no document", summary["refused"]),
        _counts("Files by extension", summary["members"]),
    ]
    return DataSet(
        name=name,
        manifest=str(manifest.path),
        facts=_facts(summary),
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
        examples=list(summary.get("refused_examples", ())),
        samples=list(gallery(manifest, _NUM_SAMPLES)),
    )


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    documents, copies = summary.get("documents"), summary.get("copies")
    facts = [
        ("samples", f"{summary['samples']:,}"),
        ("shards", f"{summary['shards']:,}"),
        ("size", _bytes(summary["bytes"])),
    ]
    if summary["images"]["count"]:
        facts.append(("images", f"{summary['images']['count']:,}"))
    facts += [(kind, f"{summary[kind]['count']:,}") for kind in ("videos", "sounds") if kind in summary]
    if "text_characters" in summary:
        facts.append(("texts", f"{summary['text_characters']['count']:,}"))
    if "text_tokens" in summary:
        facts.append(("tokens of text", format_count(summary["text_tokens"]["sum"])))
    if documents is not None:
        facts.append(("tokens of an epoch", format_count(documents["tokens"]["sum"])))
        facts.append(("longer than a pack", f"{documents['longer_than_a_pack']:,}"))
    if copies is not None:
        facts.append(("copies of other images", f"{copies['images']:,} ({copies['share']:.2%})"))
    return facts


def _distributions(statistics: DatasetStatistics) -> list[tuple[str, Histogram, Callable[[float], str]]]:
    tally = statistics.tally
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
        ("Frames of a video", tally.videos["frames"], format_count),
        ("Seconds of a video", tally.videos["seconds"], _plain),
        ("Seconds of a sound", tally.sounds["seconds"], _plain),
        ("Samples of a shard", statistics.shards, format_count),
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
