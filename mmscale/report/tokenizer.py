"""Curves of the training of an image tokenizer: quality of reconstructions, use of the codes, and the discriminator."""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.report.charts import Chart, Line
from mmscale.report.curves import Point, Record, series, smooth, thin

_CHARTS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("PSNR", "of the reconstructions of a step's images", "dB", {"psnr": ""}),
    ("Codebook usage", "share of the codes that a step uses", "%", {"codebook_usage": ""}),
    ("Codebook perplexity", "number of codes, if all were used equally often", "", {"codebook_perplexity": ""}),
    ("Discriminator", "mean logit of patches", "", {"disc_real": "images", "disc_fake": "reconstructions"}),
    ("Adaptive weight", "of the adversarial term, before its coefficient", "", {"adaptive_weight": ""}),
    ("Perceptual distance", "between reconstructions and images", "", {"perceptual": ""}),
)
"""Title, note, unit, and the metrics of each chart with their labels."""


def tokenizer_charts(records: Sequence[Record], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    """Return a chart for each kind of metric that the records have; none for other models."""
    charts = []
    for title, note, unit, metrics in _CHARTS:
        lines = []
        for number, (name, label) in enumerate(metrics.items(), 1):
            points = series(records, f"metric/{name}")
            points = [(step, 100 * value) for step, value in points] if unit == "%" else points
            lines += _curve(points, label, number) if points else []
        charts += [Chart(title, note, lines, unit=unit, marks=marks)] if lines else []
    return charts


def _curve(points: Sequence[Point], label: str, colour: int) -> list[Line]:
    each = [] if label else [Line("each step", thin(points), colour, faint=True)]
    return [*each, Line(label or "smoothed", thin(smooth(points), 300), colour)]
