"""Where a step's time and a run's wall time went, from the lines of ``metrics.jsonl`` and the account of goodput."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from mmscale.metrics.goodput import Goodput
from mmscale.metrics.progress import format_count
from mmscale.report.curves import Point, Record, StageMark, finite, series, smooth, thin
from mmscale.report.svg import Layer, Line, line_chart, stacked_chart

_PHASES = (("forward", 1), ("backward", 2), ("optimizer", 3), ("data", 4))
"""From the bottom up, with page colours; data has that of its own curve. What is left is ``other``, in colour 5."""
_POINTS = 300

_WALL = (
    ("training", "advanced training"),
    ("data", "waiting for data"),
    ("checkpoint", "checkpoints"),
    ("setup", "start-up"),
    ("repeated", "steps done again"),
    ("evaluation", "evaluation"),
    ("down", "between starts"),
    ("other", "other"),
)


def step_figures(records: Sequence[Record], stages: Sequence[StageMark], width: int) -> list[tuple[str, str, Markup]]:
    """(title, note, chart) of what the records hold: shares of a step, MFU, gradient norms of components."""
    figures = []
    layers = step_layers(records)
    if layers:
        note = "share of a step, rank 0 · communication is inside the phases"
        figures.append(("Time of a step", note, stacked_chart(layers, stages, width=width)))
    mfu = series(records, "mfu")
    if mfu:
        lines = [
            Line("each step", thin(_percent(mfu)), 1, faint=True),
            Line("smoothed", thin(smooth(_percent(mfu)), _POINTS), 1),
        ]
        chart = line_chart(lines, stages, format_value=lambda value: f"{value:.3g}%", from_zero=True, width=width)
        figures.append(("Model FLOPs utilisation", "model operations, share of the devices' peak", chart))
    names = sorted({key for record in records for key in record if key.startswith("grad_norm/")})
    if names:
        lines = [
            Line(name.removeprefix("grad_norm/"), thin(series(records, name)), number % 5 + 1)
            for number, name in enumerate(names)
        ]
        chart = line_chart(lines, stages, format_value=lambda value: f"{value:.3g}", from_zero=True, width=width)
        figures.append(("Gradient norm by component", "before clipping", chart))
    return figures


def step_layers(records: Sequence[Record]) -> list[Layer]:
    """Smoothed shares of the phases of each step; empty without a measured step. Together they are the whole step."""
    measured = [r for r in records if finite(r.get("seconds")) and finite(r.get("forward_seconds")) is not None]
    if not measured:
        return []
    steps = [float(record["step"]) for record in measured]
    shares = {name: [_share(record, name) for record in measured] for name, _ in _PHASES}
    shares["other"] = [max(0.0, 1 - sum(parts)) for parts in zip(*shares.values(), strict=True)]
    keep = range(0, len(steps), -(-len(steps) // _POINTS))
    layers = []
    for name, colour in (*_PHASES, ("other", 5)):
        points = smooth(list(zip(steps, shares[name], strict=True)))
        layers.append(Layer(name, [points[index] for index in keep], colour))
    return layers


def _share(record: Record, phase: str) -> float:
    key = "data_wait_seconds" if phase == "data" else f"{phase}_seconds"
    return min(1.0, (finite(record.get(key)) or 0.0) / float(record["seconds"]))


def _percent(points: Sequence[Point]) -> list[Point]:
    return [(step, 100 * value) for step, value in points]


def step_rows(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Overall shares of the phases and of communication, MFU, and operations a second."""
    measured = [record for record in records if finite(record.get("forward_seconds")) is not None]
    spent = _sum(measured, "seconds")
    if not spent:
        return []
    rows = [
        (f"{name}, of a step", f"{100 * _sum(measured, f'{name}_seconds') / spent:.1f}%")
        for name in ("forward", "backward", "optimizer", "communication")
    ]
    known = [record for record in measured if finite(record.get("mfu")) is not None and finite(record.get("seconds"))]
    if known:
        mfu = sum(float(r["mfu"]) * float(r["seconds"]) for r in known) / _sum(known, "seconds")
        rows.append(("MFU", f"{100 * mfu:.1f}%"))
    if _sum(measured, "model_flops"):
        rows.append(("model operations per second", format_count(_sum(measured, "model_flops") / spent)))
    return rows


def _sum(records: Sequence[Record], key: str) -> float:
    return sum(finite(record.get(key)) or 0.0 for record in records)


def goodput_shares(goodput: Goodput | None) -> list[tuple[str, float, float]]:
    """(name, seconds, share) of each use of a run's wall time that took any."""
    if goodput is None or not goodput.wall:
        return []
    spent = [(words, float(getattr(goodput, name))) for name, words in _WALL]
    return [(words, seconds, seconds / goodput.wall) for words, seconds in spent if seconds > 0]


def goodput_rows(goodput: Goodput | None) -> list[tuple[str, str]]:
    """The headline, and over how many starts."""
    if goodput is None:
        return []
    return [("goodput", f"{100 * goodput.share:.1f}%"), ("starts", str(goodput.starts))]
