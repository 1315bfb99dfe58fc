"""``comparison.html`` and ``comparison.json``: one page and one file of figures, made from the run folders.

Everything is inlined, as in a run's report. Curves of the seeds are laid onto common places, and drawn as their mean
and the band from the lowest to the highest seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.compare.config import Comparison
from mmscale.compare.figures import Curve, Figure, RunFigures, VariantFigures, read_variants, variant_json
from mmscale.compare.limits import limits
from mmscale.compare.plan import Trial
from mmscale.compare.runs import Failure
from mmscale.compare.start import alike
from mmscale.metrics.format import format_count, format_seconds
from mmscale.report.charts import Bar, Chart, Line
from mmscale.report.curves import smooth
from mmscale.report.page import render_page

_PLACES = 200
_COLOURS = 5


@dataclass(frozen=True)
class Row:
    """One variant in a table: its name, colour and cells; each cell has a figure and what stands small below it."""

    name: str
    colour: int
    cells: list[tuple[str, str]]


def write_comparison(comparison: Comparison, trials: Sequence[Trial], failures: Sequence[Failure]) -> dict[str, Any]:
    """Writes both files from whatever is finished.

    Returns:
        What ``comparison.json`` holds.
    """
    variants = read_variants(comparison, trials)
    start = alike(comparison)
    sentences = limits(comparison, trials, variants, start, failures)
    settings = comparison.settings
    figures = {
        "equal": settings.equal.value,
        "seeds": list(settings.seeds),
        "confidence": settings.confidence,
        "first": comparison.variants[0].name,
        "variants": [variant_json(each) for each in variants],
        "begin_alike": start,
        "failed": [asdict(failure) for failure in failures],
        "limits": sentences,
    }
    text = json.dumps(_plain(figures), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(comparison.figures, as_utf8(f"{text}\n"), parents=True)
    write_whole(comparison.page, as_utf8(_render(comparison, trials, variants, sentences)), parents=True)
    plain: dict[str, Any] = json.loads(text)
    return plain


def _plain(value: Any) -> Any:
    """JSON has no NaN: the loss of a run that diverged becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _render(
    comparison: Comparison, trials: Sequence[Trial], variants: Sequence[VariantFigures], sentences: Sequence[str]
) -> str:
    colours = {each.name: number % _COLOURS + 1 for number, each in enumerate(comparison.variants)}
    done = sum(len(each.runs) for each in variants)
    return render_page(
        Path(__file__).with_name("comparison.html.jinja"),
        title=comparison.run_dir.resolve().name,
        done=done,
        planned=len(trials),
        facts=_facts(comparison, variants),
        heads=_result_heads(variants),
        results=[_result_row(each, colours[each.name]) for each in variants],
        costs=[_cost_row(each, colours[each.name]) for each in variants],
        scores=_scores(variants, colours),
        charts=_charts(variants, colours),
        limits=sentences,
        variants=[(each.name, colours[each.name], each.overrides) for each in comparison.variants],
    )


def _facts(comparison: Comparison, variants: Sequence[VariantFigures]) -> list[tuple[str, str]]:
    settings = comparison.settings
    facts = [
        ("equal", "learned tokens" if settings.equal.value == "tokens" else "operations"),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("variants", str(len(comparison.variants))),
    ]
    machines = {run.machine: None for each in variants for run in each.runs}
    return [*facts, ("machine", "; ".join(machines))] if machines else facts


def _result_heads(variants: Sequence[VariantFigures]) -> list[str]:
    """Of each set its loss and its score, as far as it has them."""
    heads = ["training loss, last tenth"]
    for name, held in variants[0].heldout.items() if variants else ():
        heads += [f"{name}: loss of what is right"] if held.loss else []
        heads += [f"{name}: right choices"] if held.score else []
    return heads


def _result_row(figures: VariantFigures, colour: int) -> Row:
    cells = [_cell(figures.train_loss, _nats)]
    for held in figures.heldout.values():
        cells += [_cell(held.loss, _nats)] if held.loss else []
        if held.score:
            permuted = [] if held.control is None else [f"images permuted {_percent(held.control)}"]
            cells.append(_cell(held.score, _percent, permuted))
    return Row(figures.name, colour, cells)


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _cell(figure: Figure, text: Callable[[float], str], more: Sequence[str] = ()) -> tuple[str, str]:
    """The mean; small below it the interval, the difference from the first variant, and the error of what was asked."""
    mean, difference, below = figure.mean, figure.difference, []
    if mean.low is not None and mean.high is not None:
        below.append(f"{text(mean.low)} to {text(mean.high)}")
    if difference is not None:
        sign = "+" if difference.mean >= 0 else "−"
        spread = "" if difference.half is None else f" ± {text(difference.half)}"
        below.append(f"difference {sign}{text(abs(difference.mean))}{spread}")
    if figure.asked_error is not None:
        below.append(f"of what was asked ± {text(figure.asked_error)}")
    return text(mean.mean), "\n".join([*below, *more])


def _cost_row(figures: VariantFigures, colour: int) -> Row:
    params = figures.runs[0].params
    parts = " · ".join(f"{name} {format_count(count)}" for name, count in params["components"].items())
    active = f"active {format_count(params['active'])}\n" if params["active"] != params["total"] else ""

    def middle(figure: Callable[[RunFigures], float], text: Callable[[float], str] = format_count) -> str:
        return text(figures.median(figure))

    return Row(
        figures.name,
        colour,
        [
            (format_count(params["total"]), active + parts),
            (middle(lambda run: run.steps), f"{middle(lambda run: run.samples)} samples"),
            (
                middle(lambda run: run.learned_tokens),
                f"of {middle(lambda run: run.tokens)} tokens in the decoder",
            ),
            (middle(lambda run: run.flops), "forward and backward"),
            (
                f"{middle(lambda run: run.timing.learned_tokens_per_second)}/s",
                f"{middle(lambda run: run.timing.samples_per_second)} samples/s\n"
                f"{middle(lambda run: run.timing.tokens_per_second)} decoder tokens/s",
            ),
            (
                middle(lambda run: run.timing.step_seconds, lambda value: f"{value:.3g} s"),
                f"{middle(lambda run: run.timing.train_seconds, format_seconds)} a run",
            ),
            (middle(lambda run: run.timing.memory_bytes, lambda value: f"{value / 2**20:,.0f} MiB"), "of a rank"),
        ],
    )


def _scores(variants: Sequence[VariantFigures], colours: Mapping[str, int]) -> list[tuple[str, str, list[Bar]]]:
    """(set, note, bars) of each set with a score: the scores with their intervals over seeds, and a blind guess."""
    found = []
    for name, held in variants[0].heldout.items() if variants else ():
        scores = {each.name: figure for each in variants if (figure := each.heldout[name].score) is not None}
        if held.chance is None or not scores:
            continue
        bars = [
            Bar(variant, score.mean.mean, score.mean.half or 0.0, colours[variant]) for variant, score in scores.items()
        ]
        bars.append(Bar("chance", held.chance, 0.0, 0))
        found.append((name, f"{held.metric} · {held.n:,} samples", bars))
    return found


def _charts(variants: Sequence[VariantFigures], colours: Mapping[str, int]) -> list[Chart]:
    if not any(run.curve.loss for each in variants for run in each.runs):
        return []
    note = "smoothed; mean over seeds, band from the lowest to the highest"
    return [
        _loss_chart(variants, colours, lambda curve: curve.learned_tokens, "learned tokens", note),
        _loss_chart(variants, colours, lambda curve: curve.flops, "operations", note),
    ]


def _loss_chart(
    variants: Sequence[VariantFigures],
    colours: Mapping[str, int],
    over: Callable[[Curve], Sequence[float]],
    name: str,
    note: str,
) -> Chart:
    largest = max(over(run.curve)[-1] for each in variants for run in each.runs if run.curve.loss)
    unit, size = _unit(largest)
    lines = []
    for each in variants:
        spread = _spread([run.curve for run in each.runs if run.curve.loss], over, size)
        points, ends = [(x, mean) for x, _, mean, _ in spread], [(low, high) for _, low, _, high in spread]
        lines.append(Line(each.name, points, colours[each.name], spread=ends))
    axis = " ".join(filter(None, [unit, name]))
    return Chart(f"Training loss over {axis}", note, lines, axis)


def _unit(largest: float) -> tuple[str, float]:
    """A unit in which the largest place is a number of three digits or more, so that marks are whole."""
    names = {1.0: "", 1e3: "thousand", 1e6: "million", 1e9: "billion", 1e12: "trillion"}
    powers = [size for size in (*names, 1e15, 1e18, 1e21) if largest >= 100 * size] or [1.0]
    size = powers[-1]
    return names.get(size, f"10^{len(f'{size:.0f}') - 1}"), size


def _spread(
    curves: Sequence[Curve], over: Callable[[Curve], Sequence[float]], size: float
) -> list[tuple[float, float, float, float]]:
    """(place, lowest, mean, highest) of smoothed curves, where all of them are."""
    smoothed = [smooth(list(zip(over(curve), curve.loss, strict=True))) for curve in curves]
    low, high = max(points[0][0] for points in smoothed), min(points[-1][0] for points in smoothed)
    places = np.linspace(low, high, min(_PLACES, len(smoothed[0]))) if high > low else np.array([low])
    values = np.array([np.interp(places, [x for x, _ in points], [y for _, y in points]) for points in smoothed])
    columns = (places / size, values.min(0), values.mean(0), values.max(0))
    return list(zip(*(column.tolist() for column in columns), strict=True))
