"""The report's section about experts: balance over the steps from ``metrics.jsonl``, loads from ``router.json``.

router/... keys  --> charts over the steps: median of the blocks, with a band from the lowest to the highest
RouterWindow     --> charts over the blocks, and a heat map of block by expert for text and for image tokens
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmscale.metrics.router_log import Column, RouterWindow, max_over_mean
from mmscale.metrics.sample_images import encode_png
from mmscale.report.charts import Chart, Line
from mmscale.report.curves import Point, Record, column, series, thin

_BLOCK_KEY = re.compile(r"router/(\d{1,9})/max_over_mean")
_POINTS = 300
_OCTAVES = 2
"""A heat map shows loads from 1/4 to 4 times the mean of the block."""
_LOW, _MEAN, _HIGH, _NONE = ((39, 84, 190), (246, 246, 243), (196, 84, 20), (16, 16, 18))
_WIDE_EXPERTS, _MOST_LABELS = 64, 16


@dataclass(frozen=True)
class HeatMap:
    """Loads of the experts of each block, for one kind of tokens.

    Attributes:
        title: Heading.
        note: A sentence about the tokens.
        image: PNG as a data URL: a row for each block, a column for each expert.
        rows, columns: (position in percent, number) of the labelled blocks and experts.
        height: In pixels.
        is_wide: Whether it needs the full width of the page.
    """

    title: str
    note: str
    image: str
    rows: Sequence[tuple[float, int]]
    columns: Sequence[tuple[float, int]]
    height: int
    is_wide: bool


@dataclass(frozen=True)
class ExpertSection:
    """The section of a run with experts. Parts without data are empty.

    Attributes:
        facts: (name, value) of the newest window.
        charts: Over the steps, then over the blocks.
        maps: One for each kind of tokens.
        scale: Colours of the heat maps as CSS, from 1/4 to 4 times the mean.
        none: Colour of an expert without a token.
    """

    facts: Sequence[tuple[str, str]]
    charts: Sequence[Chart]
    maps: Sequence[HeatMap]
    scale: Sequence[str] = tuple(f"rgb{colour}" for colour in (_LOW, _MEAN, _HIGH))
    none: str = f"rgb{_NONE}"


def expert_section(
    records: Sequence[Record], window: RouterWindow | None, marks: Sequence[tuple[float, str]]
) -> ExpertSection | None:
    """Return the section of a run; None if the run has recorded no router.

    Args:
        records: Lines of ``metrics.jsonl``.
        window: Content of ``router.json``, if it exists.
        marks: Stages as marks of a chart.
    """
    charts = _step_charts([record for record in records if "router/max_over_mean" in record], marks)
    if window is None:
        return ExpertSection((), charts, ()) if charts else None
    return ExpertSection(_facts(window), [*charts, *_block_charts(window)], _maps(window))


def _step_charts(records: Sequence[Record], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    blocks = sorted({int(found[1]) for record in records for key in record if (found := _BLOCK_KEY.fullmatch(key))})
    if not blocks:
        return []
    kinds = (
        ("max_over_mean", "Max over mean", "largest load of an expert, divided by the mean load", 1),
        ("entropy", "Entropy of the router", "mean of a token's probabilities, in nats", 2),
        ("modality_distance", "Distance of text and image tokens", "0: same experts · 1: no common expert", 4),
        ("dropped", "Dropped choices", "share of the choices, because of capacity_factor", 3),
    )
    charts = []
    for name, title, note, colour in kinds:
        lines = _band(records, [f"router/{block}/{name}" for block in blocks], colour)
        charts.append(Chart(title, f"{note} · by block", lines, from_zero=name != "max_over_mean", marks=marks))
    dead = [Line("all blocks", thin(series(records, "router/dead"), _POINTS), 5)]
    charts.insert(2, Chart("Dead experts", "without a token in a window", dead, from_zero=True, marks=marks))
    return [chart for chart in charts if not chart.is_empty]


def _band(records: Sequence[Record], keys: Sequence[str], colour: int) -> list[Line]:
    """Return the median of the blocks with a band from the lowest to the highest, and the highest as a line."""
    values = np.stack([column(records, key) for key in keys])
    known = ~np.isnan(values).all(0)
    if not known.any():
        return []
    steps, values = column(records, "step")[known], values[:, known]
    spread = {
        step: (low, high)
        for step, low, high in zip(
            steps.tolist(), np.nanmin(values, 0).tolist(), np.nanmax(values, 0).tolist(), strict=True
        )
    }
    highest: list[Point] = thin([(step, high) for step, (_, high) in spread.items()], _POINTS)
    middle = thin(list(zip(steps.tolist(), np.nanmedian(values, 0).tolist(), strict=True)), _POINTS)
    line = Line("median block", middle, colour, spread=[spread[step] for step, _ in middle])
    return [line] if len(keys) == 1 else [Line("highest block", highest, colour, faint=True), line]


def _block_charts(window: RouterWindow) -> list[Chart]:
    """Return the charts over the blocks; none for a single block, whose values are facts."""
    if len(window.blocks) == 1:
        return []
    entropy = np.divide(
        window.entropy, window.tokens, out=np.full(window.entropy.shape, np.nan), where=window.tokens > 0
    )
    by_kind = [
        ("Max over mean by block", "", window.max_over_mean(), max_over_mean(window.load).T),
        (
            "Entropy by block",
            f"nats · equal probabilities: {_most_entropy(window):.3g}",
            window.mean_entropy(),
            entropy.T,
        ),
        ("Dead experts by block", "", window.dead(), (window.load == 0).sum(2).T),
    ]
    charts = []
    for title, note, whole, parts in by_kind:
        lines = [_line(window, "all tokens", whole, 1)]
        for number, name in enumerate(window.kinds):
            if window.tokens[:, number].any():
                lines.append(_line(window, f"{name} tokens", parts[number], number + 2))
        charts.append(
            Chart(title, _join(_steps(window), note), lines, axis="block", from_zero=title.startswith("Dead"))
        )
    distance = [_line(window, "text and image", window.modality_distance(), 4)]
    charts.append(Chart("Distance by block", _steps(window), distance, axis="block", from_zero=True))
    return [chart for chart in charts if not chart.is_empty]


def _line(window: RouterWindow, label: str, values: npt.NDArray[np.generic], colour: int) -> Line:
    pairs = zip(window.blocks, values.astype(np.float64).tolist(), strict=True)
    return Line(label, [(block, value) for block, value in pairs if not math.isnan(value)], colour)


def _facts(window: RouterWindow) -> list[tuple[str, str]]:
    length, _, experts = window.load.shape
    counts = window.tokens.max(0).tolist()
    facts = [
        ("steps", f"{window.first:,} to {window.last:,}"),
        (", ".join(f"{kind} tokens" for kind in window.kinds), ", ".join(f"{count:,}" for count in counts)),
        ("experts", f"{length * experts:,} in {length} block" + "s" * (length > 1)),
        ("dead experts", f"{int(window.dead().sum()):,}"),
    ]
    ratio, distance = window.max_over_mean(), window.modality_distance()
    if not np.isnan(ratio).all():
        facts.append(("max over mean, worst block", _with_block(window, ratio)))
        entropy = float(np.nanmean(window.mean_entropy()))
        facts.append(("entropy, mean of the blocks", f"{entropy:.3g} of {_most_entropy(window):.3g} nats"))
    if window.dropped.any():
        facts.append(("dropped choices", f"{100 * window.dropped.sum() / window.load.sum():.2g}%"))
    if not np.isnan(distance).all():
        facts.append(("distance of text and image tokens, mean of the blocks", f"{np.nanmean(distance):.2f}"))
        facts.append(("largest distance", _with_block(window, distance)))
    return facts


def _with_block(window: RouterWindow, values: Column) -> str:
    place = int(np.nanargmax(values))
    return f"{values[place]:.2f} (block {window.blocks[place]})"


def _maps(window: RouterWindow) -> list[HeatMap]:
    length, _, experts = window.load.shape
    rows = [(100 * (place + 0.5) / length, window.blocks[place]) for place in _labelled(length)]
    columns = [(100 * (place + 0.5) / experts, place) for place in _labelled(experts)]
    height = length * max(4, min(16, 280 // length))
    maps = []
    for number, name in enumerate(window.kinds):
        if window.tokens[:, number].any():
            image = "data:image/png;base64," + base64.b64encode(encode_png(_pixels(window.load[:, number]))).decode()
            title, note = f"Load by {name} tokens", f"{_steps(window)} · {window.tokens[:, number].max():,} tokens"
            maps.append(HeatMap(title, note, image, rows, columns, height, experts > _WIDE_EXPERTS))
    return maps


def _labelled(length: int) -> range:
    """Return the places of at most ``_MOST_LABELS`` labels, a power of two apart."""
    return range(0, length, 1 << max(0, math.ceil(math.log2(length / _MOST_LABELS))))


def _pixels(load: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the colours ``(L, E, 3)`` of loads ``(L, E)``, relative to the mean of the block on a log scale."""
    ratio = load / np.maximum(load.mean(1, keepdims=True), 1e-9)
    level = np.clip(np.log2(np.maximum(ratio, 1e-9)) / _OCTAVES, -1, 1)[..., None]
    low, mean, high = (np.array(colour, np.float64) for colour in (_LOW, _MEAN, _HIGH))
    colours = mean + np.abs(level) * np.where(level < 0, low - mean, high - mean)
    colours[load == 0] = _NONE
    return colours.round().astype(np.uint8)


def _most_entropy(window: RouterWindow) -> float:
    return math.log(window.load.shape[2])


def _steps(window: RouterWindow) -> str:
    return f"steps {window.first:,} to {window.last:,}"


def _join(*notes: str) -> str:
    return " · ".join(note for note in notes if note)
