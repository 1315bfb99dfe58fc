"""Charts as SVG text: curves over steps with the stages marked, and bars with error marks.

Colours are CSS variables of the page, so a chart follows its light and dark dress. All text is escaped here; what these
functions return is safe to put into a page as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from mmscale.report.curves import Point, StageMark

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 24, 26


@dataclass(frozen=True)
class Line:
    """One curve. ``colour`` is the number of a page colour (1 to 5); a faint line is background to another one."""

    label: str
    points: Sequence[Point]
    colour: int = 1
    faint: bool = False


@dataclass(frozen=True)
class Band:
    """What lies between two curves, behind the lines: (x, low, high). ``colour`` as of a line."""

    points: Sequence[tuple[float, float, float]]
    colour: int = 1


@dataclass(frozen=True)
class Bar:
    """One bar: a share in [0, 1] with its standard error, or half the width of its interval."""

    label: str
    value: float
    error: float
    kind: str
    """CSS class: ``score``, ``control``, ``chance``, or ``a1`` to ``a5`` for the page's colours."""


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about ``target`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / target
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    lines: Sequence[Line],
    stages: Sequence[StageMark],
    *,
    format_value: Callable[[float], str],
    width: int = 640,
    height: int = 230,
    from_zero: bool = False,
    bands: Sequence[Band] = (),
    axis: str = "step",
) -> Markup:
    """Curves over a common axis, mostly that of steps.

    Args:
        lines: Drawn in order, later ones on top.
        stages: Bands behind the curves, labelled where there are several.
        format_value: Text of an axis mark and of the value under the pointer.
        width: Of the drawing, user units; the page scales it.
        height: The same.
        from_zero: Whether the value axis must show 0.
        bands: Drawn behind the lines.
        axis: What the lines go over, in a word; charts of one axis are pointed at together.
    """
    points = [point for line in lines for point in line.points]
    points += [(x, y) for band in bands for x, *ends in band.points for y in ends]
    if not points:
        return Markup('<p class="empty">Nothing recorded yet.</p>')
    frame = _Frame.around(points, stages, width, height, from_zero)
    shown = [line for line in lines if not line.faint]
    data = json.dumps(
        {
            "axis": axis,
            "x": [frame.left, frame.right],
            "steps": [frame.first_step, frame.last_step],
            "lines": [
                {
                    "label": line.label,
                    "colour": line.colour,
                    "points": [[int(x), format_value(y), round(frame.y(y), 1)] for x, y in line.points],
                }
                for line in shown
            ],
        },
        ensure_ascii=False,
    )
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" data-chart="{escape(data)}">',
        *_stage_bands(stages, frame),
        *_axes(frame, format_value),
        *(_band(band, frame) for band in bands),
        *(_path(line, frame) for line in lines),
        '<g class="pointer"></g></svg>',
    ]
    legend = _legend(shown) if len(shown) > 1 or ", " in shown[0].label else ""
    return Markup("".join(parts) + legend)


@dataclass(frozen=True)
class _Frame:
    """Maps steps and values into the drawing."""

    first_step: float
    last_step: float
    low: float
    high: float
    left: float
    right: float
    top: float
    bottom: float

    @classmethod
    def around(
        cls, points: Sequence[Point], stages: Sequence[StageMark], width: int, height: int, from_zero: bool
    ) -> _Frame:
        steps = [x for x, _ in points] + [float(s) for mark in stages for s in (mark.first, mark.last)]
        values = [y for _, y in points] + ([0.0] if from_zero else [])
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        low = low if from_zero and low == 0 else low - margin
        return cls(min(steps), max(steps), low, high + margin, _LEFT, width - _RIGHT, _TOP, height - _BOTTOM)

    def x(self, step: float) -> float:
        span = self.last_step - self.first_step
        share = (step - self.first_step) / span if span else 0.5
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)


def _stage_bands(stages: Sequence[StageMark], frame: _Frame) -> list[str]:
    if len(stages) < 2:
        return []
    parts = []
    for number, mark in enumerate(stages):
        start = frame.x(mark.first)
        end = frame.x(stages[number + 1].first) if number + 1 < len(stages) else frame.right
        parts.append(
            f'<rect class="band band{number % 2}" x="{start:.1f}" y="{frame.top - 18}" '
            f'width="{max(0.0, end - start):.1f}" height="{frame.bottom - frame.top + 18}"/>'
        )
        if number:
            parts.append(
                f'<line class="stage" x1="{start:.1f}" x2="{start:.1f}" y1="{frame.top - 18}" y2="{frame.bottom}"/>'
            )
        if end - start > 24:
            limit = int((end - start) / 6.5)
            name = mark.name if len(mark.name) <= limit else mark.name[: max(1, limit - 1)] + "…"
            parts.append(f'<text class="stage-name" x="{start + 6:.1f}" y="{frame.top - 6}">{escape(name)}</text>')
    return parts


def _axes(frame: _Frame, format_value: Callable[[float], str]) -> list[str]:
    parts = []
    for tick in nice_ticks(frame.low, frame.high):
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 7}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{escape(format_value(tick))}</text>"
        )
    ticks = [tick for tick in nice_ticks(frame.first_step, frame.last_step, 6) if tick == int(tick)]
    for tick in ticks:
        parts.append(
            f'<text class="tick" x="{frame.x(tick):.1f}" y="{frame.bottom + 17}" text-anchor="middle">'
            f"{int(tick):,}</text>"
        )
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    return parts


def _path(line: Line, frame: _Frame) -> str:
    kind = "faint" if line.faint else "line"
    if len(line.points) == 1:
        ((x, y),) = line.points
        return f'<circle class="dot c{line.colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
    steps = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    return f'<polyline class="{kind} c{line.colour}" points="{steps}"/>'


@dataclass(frozen=True)
class Layer:
    """One part of a whole over steps, as shares in [0, 1]. ``colour`` is the number of a page colour (1 to 5)."""

    label: str
    points: Sequence[Point]
    colour: int


def stacked_chart(layers: Sequence[Layer], stages: Sequence[StageMark], *, width: int, height: int = 230) -> Markup:
    """Shares of a whole, one on top of the other; all layers have the same steps.

    Args:
        layers: From the bottom up; together at most 1 at each step.
        stages: Labelled above where there are several.
        width: Of the drawing, user units; the page scales it.
        height: The same.
    """
    if not layers or not layers[0].points:
        return Markup('<p class="empty">Nothing recorded yet.</p>')
    steps = [step for step, _ in layers[0].points]
    frame = _Frame(steps[0], steps[-1], 0.0, 1.0, _LEFT, width - _RIGHT, _TOP, height - _BOTTOM)
    below = [0.0] * len(steps)
    areas, lines = [], []
    for layer in layers:
        above = [low + share for low, (_, share) in zip(below, layer.points, strict=True)]
        areas.append(_area(layer.colour, steps, below, above, frame))
        shown = zip(layer.points, above, strict=True)
        points = [[int(step), f"{100 * share:.1f}%", round(frame.y(top), 1)] for (step, share), top in shown]
        lines.append({"label": layer.label, "colour": layer.colour, "points": points})
        below = above
    ends = [steps[0], steps[-1]]
    data = json.dumps(
        {"axis": "step", "x": [frame.left, frame.right], "steps": ends, "lines": lines}, ensure_ascii=False
    )
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" data-chart="{escape(data)}">',
        *areas,
        *_stage_bands(stages, frame),
        *_axes(frame, lambda value: f"{100 * value:.0f}%"),
        '<g class="pointer"></g></svg>',
    ]
    return Markup("".join(parts) + _legend([Line(layer.label, layer.points, layer.colour) for layer in layers]))


def _band(band: Band, frame: _Frame) -> str:
    there = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in band.points]
    back = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(band.points)]
    return f'<polygon class="spread a{band.colour}" points="{" ".join([*there, *back])}"/>'


def _area(colour: int, steps: Sequence[float], below: Sequence[float], above: Sequence[float], frame: _Frame) -> str:
    if len(steps) == 1:  # A single step is drawn as wide as the chart.
        ends = [frame.left, frame.right]
        below, above = [*below, *below], [*above, *above]
    else:
        ends = [frame.x(step) for step in steps]
    there = [f"{x:.1f},{frame.y(y):.1f}" for x, y in zip(ends, above, strict=True)]
    back = [f"{x:.1f},{frame.y(y):.1f}" for x, y in zip(ends, below, strict=True)][::-1]
    return f'<polygon class="layer a{colour}" points="{" ".join([*there, *back])}"/>'


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(f'<span><i class="key k{line.colour}"></i>{escape(line.label)}</span>' for line in lines)
    return f'<div class="legend">{items}</div>'


def bar_chart(bars: Sequence[Bar], *, width: int = 360, label_width: int = 66) -> Markup:
    """Horizontal bars of shares on a common axis from 0 to the largest, with standard-error marks and figures."""
    row, figure_width = 26, 92
    scale = max([bar.value + bar.error for bar in bars] + [1e-9])
    length = width - label_width - figure_width
    parts = [f'<svg class="bars" viewBox="0 0 {width} {row * len(bars)}" role="img">']
    for number, bar in enumerate(bars):
        y = row * number
        middle = y + row / 2
        end = label_width + length * bar.value / scale
        parts.append(f'<text class="bar-label" x="0" y="{middle + 4}">{escape(bar.label)}</text>')
        parts.append(
            f'<rect class="track" x="{label_width}" y="{y + 6}" width="{length}" height="{row - 12}" rx="3"/>'
            f'<rect class="bar {bar.kind}" x="{label_width}" y="{y + 6}" width="{max(1.5, end - label_width):.1f}" '
            f'height="{row - 12}" rx="3"/>'
        )
        if bar.error:
            low = label_width + length * max(0.0, bar.value - bar.error) / scale
            high = label_width + length * (bar.value + bar.error) / scale
            parts.append(
                f'<path class="whisker" d="M{low:.1f},{middle}H{high:.1f}'
                f'M{low:.1f},{middle - 4}v8M{high:.1f},{middle - 4}v8"/>'
            )
        figure = f"{100 * bar.value:.1f}%" + (f" ± {100 * bar.error:.1f}" if bar.error else "")
        parts.append(f'<text class="bar-figure" x="{width}" y="{middle + 4}" text-anchor="end">{figure}</text>')
    return Markup("".join(parts) + "</svg>")
