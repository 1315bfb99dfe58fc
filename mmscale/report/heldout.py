"""Curves of the held-out results during training, from the ``heldout/SET/VALUE`` keys of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.report.charts import Chart, Line
from mmscale.report.curves import Record, series

_PREFIX = "heldout/"


def heldout_charts(records: Sequence[Record], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    """Return charts of scores, losses and Frechet distances, each with a line per set; none without such values.

    Bands are one standard error wide on each side.
    """
    sets = sorted({key.split("/")[1] for record in records for key in record if key.startswith(_PREFIX)})
    scores = [_line(records, name, "score", number, 100.0) for number, name in enumerate(sets)]
    losses = [_line(records, name, "loss", number, 1.0) for number, name in enumerate(sets)]
    distances = [_line(records, name, "frechet", number, 1.0) for number, name in enumerate(sets)]
    charts = [
        Chart("Held-out score", "share of right answers, with its standard error", scores, unit="%", marks=marks),
        Chart("Held-out loss", "mean per token of the right answers or documents", losses, marks=marks),
        Chart("Frechet distance", "of drawings to real images", distances, from_zero=True, marks=marks),
    ]
    return [chart for chart in charts if not chart.is_empty]


def _line(records: Sequence[Record], name: str, value: str, number: int, factor: float) -> Line:
    points = [(step, factor * y) for step, y in series(records, f"{_PREFIX}{name}/{value}")]
    # ``error`` belongs to the score, or to the loss of a set that has no score.
    has_error = value == "score" or not series(records, f"{_PREFIX}{name}/score")
    errors = dict(series(records, f"{_PREFIX}{name}/error")) if has_error else {}
    spread = [(y - factor * errors[step], y + factor * errors[step]) for step, y in points if step in errors]
    return Line(name, points, number % 5 + 1, spread=spread if len(spread) == len(points) else ())
