"""Write ``comparison.html`` and ``comparison.json`` from the run folders.

The page needs no other file. Training curves of the seeds are interpolated to common points; the page shows their mean
and a band from the lowest to the highest seed.
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
from mmscale.compare.limits import limits
from mmscale.compare.plan import Trial
from mmscale.compare.runs import Failure
from mmscale.compare.start import same_initial_values
from mmscale.compare.summary import Estimate, LossCurve, RunSummary, VariantSummary, read_variants, variant_json
from mmscale.metrics.format import format_count, format_seconds
from mmscale.report.charts import Bar, Chart, Line
from mmscale.report.curves import smooth
from mmscale.report.page import render_page

_CURVE_POINTS = 200
_NUM_COLOURS = 5


@dataclass(frozen=True)
class TableRow:
    """One variant in a table. Each cell is (value, smaller text below it)."""

    name: str
    colour: int
    cells: list[tuple[str, str]]


def write_comparison(comparison: Comparison, trials: Sequence[Trial], failures: Sequence[Failure]) -> dict[str, Any]:
    """Write both files from the runs that are finished. Each file is written atomically.

    Returns:
        The contents of ``comparison.json``.
    """
    variants = read_variants(comparison, trials)
    start = same_initial_values(comparison)
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
    write_whole(comparison.json_path, as_utf8(f"{text}\n"), parents=True)
    write_whole(comparison.page_path, as_utf8(_render(comparison, trials, variants, sentences)), parents=True)
    plain: dict[str, Any] = json.loads(text)
    return plain


def _plain(value: Any) -> Any:
    """Replace NaN and infinity by None, because JSON lacks them (the loss of a run that diverged)."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _render(
    comparison: Comparison, trials: Sequence[Trial], variants: Sequence[VariantSummary], sentences: Sequence[str]
) -> str:
    colours = {each.name: number % _NUM_COLOURS + 1 for number, each in enumerate(comparison.variants)}
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


def _facts(comparison: Comparison, variants: Sequence[VariantSummary]) -> list[tuple[str, str]]:
    settings = comparison.settings
    facts = [
        ("equal", "learned tokens" if settings.equal.value == "tokens" else "operations"),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("variants", str(len(comparison.variants))),
    ]
    machines = {run.machine: None for each in variants for run in each.runs}
    return [*facts, ("machine", "; ".join(machines))] if machines else facts


def _result_heads(variants: Sequence[VariantSummary]) -> list[str]:
    """Return the column titles: the training loss, then loss and score of each set that has them."""
    heads = ["training loss, last tenth"]
    for name, held in variants[0].heldout.items() if variants else ():
        heads += [f"{name}: loss"] if held.loss else []
        heads += [f"{name}: {held.metric if held.chance is None else 'accuracy'}"] if held.score else []
    return heads


def _result_row(variant: VariantSummary, colour: int) -> TableRow:
    cells = [_cell(variant.train_loss, _nats)]
    for held in variant.heldout.values():
        cells += [_cell(held.loss, _nats)] if held.loss else []
        if held.score:
            what, shown = ("images", _percent) if held.chance is not None else ("answers", _hundredfold)
            permuted = [] if held.control is None else [f"{what} permuted {shown(held.control)}"]
            cells.append(_cell(held.score, shown, permuted))
    return TableRow(variant.name, colour, cells)


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _hundredfold(value: float) -> str:
    return f"{100 * value:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _cell(estimate: Estimate, text: Callable[[float], str], more: Sequence[str] = ()) -> tuple[str, str]:
    """Return the mean, and below it interval, difference from the first variant and error over questions."""
    mean, difference, below = estimate.mean, estimate.difference, []
    if mean.low is not None and mean.high is not None:
        below.append(f"{text(mean.low)} to {text(mean.high)}")
    if difference is not None:
        sign = "+" if difference.mean >= 0 else "−"
        spread = "" if difference.half is None else f" ± {text(difference.half)}"
        below.append(f"difference {sign}{text(abs(difference.mean))}{spread}")
    if estimate.asked_error is not None:
        below.append(f"standard error over questions {text(estimate.asked_error)}")
    return text(mean.mean), "\n".join([*below, *more])


def _cost_row(variant: VariantSummary, colour: int) -> TableRow:
    params = variant.runs[0].params
    parts = " · ".join(f"{name} {format_count(count)}" for name, count in params["components"].items())
    active = f"active {format_count(params['active'])}\n" if params["active"] != params["total"] else ""

    def median(value: Callable[[RunSummary], float], text: Callable[[float], str] = format_count) -> str:
        return text(variant.median(value))

    return TableRow(
        variant.name,
        colour,
        [
            (format_count(params["total"]), active + parts),
            (median(lambda run: run.steps), f"{median(lambda run: run.samples)} samples"),
            (
                median(lambda run: run.learned_tokens),
                f"of {median(lambda run: run.tokens)} tokens in the decoder",
            ),
            (median(lambda run: run.flops), "forward and backward"),
            (
                f"{median(lambda run: run.timing.learned_tokens_per_second)}/s",
                f"{median(lambda run: run.timing.samples_per_second)} samples/s\n"
                f"{median(lambda run: run.timing.tokens_per_second)} decoder tokens/s",
            ),
            (
                median(lambda run: run.timing.step_seconds, lambda value: f"{value:.3g} s"),
                f"{median(lambda run: run.timing.train_seconds, format_seconds)} per run",
            ),
            (median(lambda run: run.timing.memory_bytes, lambda value: f"{value / 2**20:,.0f} MiB"), "per rank"),
        ],
    )


def _scores(variants: Sequence[VariantSummary], colours: Mapping[str, int]) -> list[tuple[str, str, list[Bar]]]:
    """Return (set, note, bars) of each set with a score: scores with intervals over seeds, and a random guess."""
    found = []
    for name, held in variants[0].heldout.items() if variants else ():
        scores = {each.name: score for each in variants if (score := each.heldout[name].score) is not None}
        if held.chance is None or not scores:
            continue
        bars = [
            Bar(variant, score.mean.mean, score.mean.half or 0.0, colours[variant]) for variant, score in scores.items()
        ]
        bars.append(Bar("chance", held.chance, 0.0, 0))
        found.append((name, f"{held.metric} · {held.n:,} samples", bars))
    return found


def _charts(variants: Sequence[VariantSummary], colours: Mapping[str, int]) -> list[Chart]:
    if not any(run.curve.loss for each in variants for run in each.runs):
        return []
    note = "smoothed; mean over seeds, band from the lowest to the highest"
    return [
        _loss_chart(variants, colours, lambda curve: curve.learned_tokens, "learned tokens", note),
        _loss_chart(variants, colours, lambda curve: curve.flops, "operations", note),
    ]


def _loss_chart(
    variants: Sequence[VariantSummary],
    colours: Mapping[str, int],
    over: Callable[[LossCurve], Sequence[float]],
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
    """Return name and size of a unit in which ``largest`` is at least 100, so that axis marks are whole numbers."""
    names = {1.0: "", 1e3: "thousand", 1e6: "million", 1e9: "billion", 1e12: "trillion"}
    powers = [size for size in (*names, 1e15, 1e18, 1e21) if largest >= 100 * size] or [1.0]
    size = powers[-1]
    return names.get(size, f"10^{len(f'{size:.0f}') - 1}"), size


def _spread(
    curves: Sequence[LossCurve], over: Callable[[LossCurve], Sequence[float]], size: float
) -> list[tuple[float, float, float, float]]:
    """Return (x, lowest, mean, highest) of the smoothed curves, over the range of x that all of them cover."""
    smoothed = [smooth(list(zip(over(curve), curve.loss, strict=True))) for curve in curves]
    low, high = max(points[0][0] for points in smoothed), min(points[-1][0] for points in smoothed)
    common_x = np.linspace(low, high, min(_CURVE_POINTS, len(smoothed[0]))) if high > low else np.array([low])
    values = np.array([np.interp(common_x, [x for x, _ in points], [y for _, y in points]) for points in smoothed])
    columns = (common_x / size, values.min(0), values.mean(0), values.max(0))
    return list(zip(*(column.tolist() for column in columns), strict=True))
