"""Charts as data: pages draw them with uPlot. If scripts are disabled, pages show a table of values of each curve.

    Chart --data()--> JSON in the page --charts.js--> uPlot (``uplot/``, MIT, inlined)
    Bar   --the macro ``bars``--> HTML

Not for: reading metrics (``curves``). A colour is a number (1 to 5) of the page's palette, so a chart follows the
reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.prepare.stats.histogram import Histogram
from mmscale.report.curves import Point, StageMark

_NUM_BARS = 44
_LOG_FROM = 20
"""A histogram gets a logarithmic axis if its largest number exceeds this many times the median.

It also gets one if the largest number exceeds 50 times the smallest, which is not 0, and 8 times the median. With up to
``_NUM_BARS`` possible numbers the axis is linear.
"""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: Name in the legend.
        points: (x, y), finite, with ascending x.
        colour: Number of a page colour.
        faint: Whether the line is the background of another one.
        spread: (low, high) at each point, drawn as a band under the lines. Empty for none.
    """

    label: str
    points: Sequence[Point]
    colour: int = 1
    faint: bool = False
    spread: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over one axis, with a heading.

    Attributes:
        title: Heading.
        note: A sentence about the chart.
        lines: Drawn in order, later ones on top.
        axis: Name of the x axis. The cursors of charts with the same axis move together.
        unit: Written after each value.
        from_zero: Whether the y axis must show 0.
        stacked: Whether each line is drawn on top of the one before; all have the same x, together at most 100.
        marks: (x, name) of vertical lines.
        links: (x, address) of dots on the first line. A click on a dot opens the address, unless it is empty.
        ranges: Text of each bar of a histogram; empty for curves. A histogram's line holds the left edge and height
            of each bar, then the right edge and height of the last bar.
        is_log: Whether the x axis is logarithmic.
    """

    title: str
    note: str
    lines: Sequence[Line]
    axis: str = "step"
    unit: str = ""
    from_zero: bool = False
    stacked: bool = False
    marks: Sequence[tuple[float, str]] = ()
    links: Sequence[tuple[float, str]] = ()
    ranges: Sequence[str] = ()
    is_log: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.points for line in self.lines)

    def data(self) -> dict[str, Any]:
        """Return what ``charts.js`` reads."""
        return {
            "axis": self.axis,
            "unit": self.unit,
            "zero": self.from_zero,
            "stacked": self.stacked,
            "log": self.is_log,
            "marks": self.marks,
            "links": self.links,
            "ranges": self.ranges,
            "lines": [
                {
                    "label": line.label,
                    "colour": line.colour,
                    "faint": line.faint,
                    "x": [float(f"{x:.12g}") for x, _ in line.points],
                    "y": [float(f"{y:.9g}") for _, y in line.points],
                    "low": [float(f"{low:.9g}") for low, _ in line.spread],
                    "high": [float(f"{high:.9g}") for _, high in line.spread],
                }
                for line in self.lines
                if line.points
            ],
        }

    def table(self) -> list[tuple[str, list[str]]]:
        """Return the first, last, lowest and highest value of each curve, for readers without scripts.

        Empty for a histogram.
        """
        rows = []
        for line in self.lines:
            values = [y for _, y in line.points]
            if values and not self.ranges:
                ends = (values[0], values[-1], min(values), max(values))
                rows.append((line.label, [f"{value:.4g}{self.unit}" for value in ends]))
        return rows


@dataclass(frozen=True)
class Bar:
    """A share in [0, 1] with its standard error, or half the width of its confidence interval.

    Attributes:
        colour: Number of a page colour; 0 for the soft colour of a reference.
    """

    label: str
    value: float
    error: float
    colour: int


def stage_names(stages: Sequence[StageMark]) -> list[tuple[float, str]]:
    """Return (first step, name) of each stage as marks of a chart; empty for a single stage."""
    return [(mark.first, mark.name) for mark in stages] if len(stages) > 1 else []


def histogram_chart(title: str, note: str, histogram: Histogram, text: Callable[[float], str]) -> Chart:
    """Return the chart of a distribution of at least one number, with its median and 95th percentile marked.

    Args:
        title: Heading.
        note: A sentence about the numbers.
        histogram: The distribution.
        text: Formats a number for the reader.
    """
    edges, is_log = _edges(histogram)
    counts = histogram.bars(edges)
    if is_log:  # Zeros have no logarithm, so the first bar counts them.
        counts[0] += histogram.count - counts.sum()
    bars = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    is_exact = histogram.largest - histogram.smallest < _NUM_BARS  # Each number has a bar, centred on it.
    left_edges = edges - 0.5 / histogram.per_unit if is_exact else edges
    marks = [(name, histogram.quantile(share) / histogram.per_unit) for name, share in (("median", 0.5), ("p95", 0.95))]
    heights = [*counts.tolist(), float(counts[-1])]
    return Chart(
        title,
        note,
        [Line("samples", list(zip(left_edges.tolist(), heights, strict=True)))],
        axis="value",
        from_zero=True,
        marks=[(value, f"{name} {text(value)}") for name, value in marks],
        ranges=[text(low) if is_exact else f"{text(low)} to {text(high)}" for low, high in bars],
        is_log=is_log,
    )


def _edges(histogram: Histogram) -> tuple[npt.NDArray[np.floating[Any]], bool]:
    """Return the edges of the bars, in units, and whether the bars are equally wide on a logarithmic axis."""
    unit = 1 / histogram.per_unit
    low, high = histogram.smallest * unit, histogram.largest * unit
    steps = histogram.largest - histogram.smallest + 1
    if steps <= _NUM_BARS:
        return low + unit * np.arange(steps + 1), False
    median = max(histogram.quantile(0.5) * unit, unit)
    if high > _LOG_FROM * median or (high > 50 * low > 0 and high > 8 * median):
        return np.geomspace(max(low, unit / 2), high + unit, _NUM_BARS + 1), True
    width = math.ceil(steps / _NUM_BARS) * unit
    return low + width * np.arange(math.ceil(steps * unit / width - 1e-9) + 1), False
