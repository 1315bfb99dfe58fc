"""A distribution as SVG text: bars over a linear or logarithmic axis, median and 95th percentile marked.

Not for: other charts (``svg``), whose conventions hold here too: colours are the page's, all text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from data_pipeline.prepare.stats.histogram import Histogram
from mmscale.report.svg import nice_ticks

_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 22, 20
_NUM_BARS = 44
_LETTER = 6.4
"""Width of a letter of a label, about."""
_LOG_FROM = 20
"""The largest number is so many medians: on a linear axis all bars would stand at its left end."""


@dataclass(frozen=True)
class _Axis:
    """Edges of the bars, in units, and where they lie in the drawing."""

    edges: npt.NDArray[np.floating]
    is_log: bool
    offset: float
    """Of a number inside its bar: half a bar where each whole number has a bar of its own."""

    @classmethod
    def of(cls, histogram: Histogram) -> _Axis:
        unit = 1 / histogram.per_unit
        low, high = histogram.smallest * unit, histogram.largest * unit
        steps = histogram.largest - histogram.smallest + 1
        if steps <= _NUM_BARS:  # Also when all numbers are equal: then one bar.
            return cls(low + unit * np.arange(steps + 1), False, unit / 2)
        median = max(histogram.quantile(0.5) * unit, unit)
        if high > _LOG_FROM * median or (high > 50 * low > 0 and high > 8 * median):
            return cls(np.geomspace(max(low, unit / 2), high + unit, _NUM_BARS + 1), True, 0.0)
        width = math.ceil(steps / _NUM_BARS) * unit
        return cls(low + width * np.arange(math.ceil(steps * unit / width - 1e-9) + 1), False, 0.0)

    def x(self, value: float) -> float:
        first, last = self.edges[0], self.edges[-1]
        value = min(max(value + self.offset, first), last)
        share = math.log(value / first) / math.log(last / first) if self.is_log else (value - first) / (last - first)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def ticks(self) -> list[float]:
        first, last = float(self.edges[0]), float(self.edges[-1]) - 2 * self.offset
        if not self.is_log:
            ticks = nice_ticks(first, last, 4) or [first]
            return [tick for tick in ticks if not self.offset or abs(tick / self.offset / 2 % 1) < 1e-6] or [first]
        powers = range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)
        few = len(powers) < 3
        digits = (1, 2, 5) if few else (1,)
        every = [digit * 10.0**power for power in range(powers.start - 1, powers.stop) for digit in digits]
        return [tick for tick in every if first <= tick <= last]


def histogram_chart(histogram: Histogram, format_value: Callable[[float], str]) -> Markup:
    """Bars of at least one number; the pointer over a bar shows its range, count and share."""
    axis = _Axis.of(histogram)
    counts = histogram.bars(axis.edges)
    if axis.is_log:  # Zeros have no logarithm: they stand in the first bar.
        counts[0] += histogram.count - counts.sum()
    bottom = _HEIGHT - _BOTTOM
    scale = (bottom - _TOP) / max(float(counts.max()), 1e-9)
    parts = [f'<svg class="histogram" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for low, high, number in zip(axis.edges[:-1], axis.edges[1:], counts, strict=True):
        if number <= 0:
            continue
        left, right = axis.x(low - axis.offset), axis.x(high - axis.offset)
        tall = max(1.0, float(number) * scale)
        what = format_value(low) if axis.offset else f"{format_value(low)} to {format_value(high)}"
        parts.append(
            f'<rect x="{left:.1f}" y="{bottom - tall:.1f}" width="{max(0.8, min(right - left - 1, 60)):.1f}" '
            f'height="{tall:.1f}"><title>{escape(what)}: {number:,.0f} ({number / histogram.count:.1%})</title></rect>'
        )
    parts += _marks(histogram, axis, bottom, format_value)
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in axis.ticks():
        x = axis.x(tick)
        anchor = "start" if x < 20 else "end" if x > _WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{escape(format_value(tick))}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _marks(histogram: Histogram, axis: _Axis, bottom: float, format_value: Callable[[float], str]) -> list[str]:
    if histogram.smallest == histogram.largest:
        return []
    median, p95 = (histogram.quantile(share) / histogram.per_unit for share in (0.5, 0.95))
    parts, taken = list[str](), 0.0
    for name, value in (("median", median), ("p95", p95)):
        x = axis.x(value)
        parts.append(f'<line class="mark-line" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}"/>')
        label = f"{name} {format_value(value)}"
        half = _LETTER * len(label) / 2
        center = min(max(x, half), _WIDTH - half)
        if center - half < taken:  # The two labels would overlap: the caption has the number.
            continue
        taken = center + half + _LETTER
        parts.append(
            f'<text class="mark-name" x="{center:.1f}" y="{_TOP - 9}" text-anchor="middle">{escape(label)}</text>'
        )
    return parts
