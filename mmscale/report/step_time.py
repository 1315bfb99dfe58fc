"""Shares of a step's time and of a run's wall time, from ``metrics.jsonl`` and the goodput record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmscale.metrics.format import format_count
from mmscale.metrics.goodput import Goodput
from mmscale.report.charts import Chart, Line, stage_names
from mmscale.report.curves import Record, StageMark, column, quotient, series, smooth, thin, total

_PHASES = (("forward", 1), ("backward", 2), ("optimizer", 3), ("data", 4))
"""(phase, page colour), from the bottom of the stacked chart to the top.

``data`` has the colour of the chart "Data wait". ``step_layers`` adds the remaining time as ``other``, with colour 5.
"""
_POINTS = 300

_WALL = (
    ("training", "advanced training"),
    ("data", "waiting for data"),
    ("checkpoint", "checkpoints"),
    ("setup", "start-up"),
    ("repeated", "repeated steps"),
    ("evaluation", "evaluation"),
    ("down", "between starts"),
    ("other", "other"),
)


def step_charts(records: Sequence[Record], stages: Sequence[StageMark]) -> list[Chart]:
    """Return charts of the shares of a step, MFU and gradient norms of components; without those not recorded."""
    marks, charts = stage_names(stages), []
    layers = step_layers(records)
    if layers:
        note = "share of a step, rank 0 · communication is inside the phases"
        charts.append(Chart("Time of a step", note, layers, unit="%", stacked=True, marks=marks))
    mfu = [(step, 100 * value) for step, value in series(records, "mfu")]
    if mfu:
        lines = [Line("each step", thin(mfu), faint=True), Line("smoothed", thin(smooth(mfu), _POINTS))]
        note = "model operations, share of the devices' peak"
        charts.append(Chart("Model FLOPs utilisation", note, lines, unit="%", from_zero=True, marks=marks))
    names = sorted({key for record in records for key in record if key.startswith("grad_norm/")})
    if names:
        lines = [
            Line(name.removeprefix("grad_norm/"), thin(series(records, name)), number % 5 + 1)
            for number, name in enumerate(names)
        ]
        charts.append(Chart("Gradient norm by component", "before clipping", lines, from_zero=True, marks=marks))
    return charts


def step_layers(records: Sequence[Record]) -> list[Line]:
    """Return the smoothed percentage of each phase of a step; empty if no step was measured. The sum is about 100."""
    seconds = np.nan_to_num(column(records, "seconds"))
    measured = [
        record
        for record, known in zip(records, (seconds != 0) & ~np.isnan(column(records, "forward_seconds")), strict=True)
        if known
    ]
    if not measured:
        return []
    steps = column(measured, "step").tolist()
    keys = ["data_wait_seconds" if name == "data" else f"{name}_seconds" for name, _ in _PHASES]
    shares = [np.minimum(100.0, 100 * np.nan_to_num(quotient(measured, key, "seconds"))) for key in keys]
    shares.append(np.maximum(0.0, 100 - np.sum(shares, axis=0)))
    every = -(-len(steps) // _POINTS)
    return [
        Line(name, smooth(list(zip(steps, share.tolist(), strict=True)))[::every], colour)
        for (name, colour), share in zip((*_PHASES, ("other", 5)), shares, strict=True)
    ]


def step_rows(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the overall shares of the phases and of communication, MFU, and operations per second."""
    known = ~np.isnan(column(records, "forward_seconds"))
    measured = [record for record, is_known in zip(records, known, strict=True) if is_known]
    spent = total(measured, "seconds")
    if not spent:
        return []
    rows = [
        (f"{name}, of a step", f"{100 * total(measured, f'{name}_seconds') / spent:.1f}%")
        for name in ("forward", "backward", "optimizer", "communication")
    ]
    seconds, mfu = column(measured, "seconds"), column(measured, "mfu")
    seconds[np.isnan(mfu)] = 0.0
    if np.nansum(seconds):
        rows.append(("MFU", f"{100 * np.nansum(mfu * seconds) / np.nansum(seconds):.1f}%"))
    if total(measured, "model_flops"):
        rows.append(("model operations per second", format_count(total(measured, "model_flops") / spent)))
    return rows


def goodput_shares(goodput: Goodput | None) -> list[tuple[str, float, float]]:
    """Return (name, seconds, share) of each use of a run's wall time that took more than 0 seconds."""
    if goodput is None or not goodput.wall:
        return []
    spent = [(words, float(getattr(goodput, name))) for name, words in _WALL]
    return [(words, seconds, seconds / goodput.wall) for words, seconds in spent if seconds > 0]


def goodput_rows(goodput: Goodput | None) -> list[tuple[str, str]]:
    """Return the rows of goodput and the number of starts; empty if goodput is unknown."""
    if goodput is None:
        return []
    return [("goodput", f"{100 * goodput.share:.1f}%"), ("starts", str(goodput.starts))]
