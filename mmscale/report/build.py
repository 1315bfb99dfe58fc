"""Build ``report.html``, one file that shows a run, from the files in its folder. This works at any time of a run.

    config.yaml  report/origins.json  starts/starts.jsonl  metrics.jsonl  goodput.jsonl  result.json
    captions.json  report/images/*.png  drawings/                                 -->  report.html

Styles, charts and images are inlined, so the file can be mailed and opened without a network.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.errors import ConfigError, MMScaleError
from mmscale.evaluate.result import ANSWERS_FOLDER, binomial_error, read_result
from mmscale.metrics.format import format_count, format_seconds
from mmscale.metrics.goodput import Goodput, read_goodput
from mmscale.metrics.metrics_file import read_metrics
from mmscale.metrics.router_log import read_router
from mmscale.report.answers import read_answer_tables, read_drawing_galleries
from mmscale.report.captions import CaptionRecord, data_url, read_captions
from mmscale.report.charts import Bar, Chart, Line, stage_names
from mmscale.report.configuration import Setting, read_configuration
from mmscale.report.curves import (
    Point,
    Record,
    column,
    data_wait_percent,
    rate,
    series,
    smooth,
    stage_marks,
    thin,
    total,
)
from mmscale.report.drawings import DrawingsOfStep, drawing_strips, read_drawings
from mmscale.report.experts import expert_section
from mmscale.report.heldout import heldout_charts
from mmscale.report.page import render_page
from mmscale.report.spikes import WINDOW_STEPS, find_spikes, page_of
from mmscale.report.starts import changes_of, read_starts
from mmscale.report.step_time import goodput_rows, goodput_shares, step_charts, step_rows
from mmscale.report.tokenizer import tokenizer_charts

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class HeldoutCard:
    """The score of one held-out set, a line of details, and bars if the score is a share."""

    name: str
    metric: str
    samples: str
    score: str
    unit: str
    about: str
    bars: list[Bar]


@dataclass(frozen=True)
class ShareBar:
    """One part of a whole: a component's parameters, or a use of wall time in seconds (``count``)."""

    name: str
    count: int
    percent: float
    colour: int


@dataclass(frozen=True)
class CaptionedImage:
    """One captioned image. ``image`` is a data URL, or empty if the file cannot be read."""

    image: str
    expected: str
    generated: str
    right: bool


@dataclass(frozen=True)
class CaptionGallery:
    """The captioned images of one held-out set."""

    name: str
    right: int
    tiles: list[CaptionedImage]


T = TypeVar("T")


def build_report(run_dir: Path, note: Callable[[str], object] = lambda line: None) -> Path:
    """Write ``report.html`` from the files that the run folder has so far.

    The report leaves out a damaged file, and the page names it. Damaged lines of ``starts.jsonl`` and unreadable images
    are left out without a message.

    Args:
        run_dir: The run folder.
        note: Called with a message for each damaged file.

    Returns:
        The path of the report.

    Raises:
        ConfigError: the folder has neither a ``config.yaml`` nor a ``metrics.jsonl``, so it is not a run folder.
    """
    if not any((run_dir / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(
            f"{run_dir}: not a run folder (it has neither config.yaml nor metrics.jsonl); give the run_dir of a run"
        )
    path = run_dir / REPORT_FILE
    write_whole(path, as_utf8(render(run_dir, note)), parents=True)
    return path


def _read(part: Callable[[], T], empty: T, damage: list[str]) -> T:
    """Return ``part()``. If its file is damaged, return ``empty`` and append a message to ``damage``."""
    try:
        return part()
    except MMScaleError as error:
        damage.append(f"{error}; the report leaves it out")
        return empty


def render(run_dir: Path, note: Callable[[str], object] = lambda line: None) -> str:
    """Return the page as text; ``note`` as in ``build_report``."""
    damage: list[str] = []
    records: list[dict[str, Any]] = _read(lambda: read_metrics(run_dir / "metrics.jsonl"), [], damage)
    result: dict[str, Any] = _read(lambda: read_result(run_dir), {}, damage)
    captions: list[CaptionRecord] = _read(lambda: read_captions(run_dir), [], damage)
    drawings: list[DrawingsOfStep] = _read(lambda: read_drawings(run_dir), [], damage)
    configuration: dict[str, list[Setting]] = _read(lambda: read_configuration(run_dir), {}, damage)
    goodput = _read(lambda: read_goodput(run_dir), None, damage)
    router = _read(lambda: read_router(run_dir), None, damage)
    starts, spikes = read_starts(run_dir), find_spikes(records)
    damage = list(dict.fromkeys(damage))  # Two parts may read the same damaged file.
    for line in damage:
        note(line)
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        title=run_dir.resolve().name,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        finished=bool(result) and result.get("finished", True),
        last_step=records[-1]["step"] if records else 0,
        facts=_facts(records, result),
        cards=_cards(result),
        galleries=_galleries(run_dir, captions),
        strips=drawing_strips(run_dir, drawings),
        strips_title="Reconstructions" if any("metric/psnr" in record for record in records) else "Drawings",
        answers=read_answer_tables(run_dir, result.get("heldout", {})),
        scored_drawings=read_drawing_galleries(run_dir, result.get("heldout", {})),
        no_sets=_has_no_sets(configuration),
        charts=_charts(records, [(spike.step, page_of(run_dir, spike)) for spike in spikes]),
        experts=expert_section(records, router, stage_names(stage_marks(records))),
        throughput=_throughput(records),
        wall_time=_wall_time(goodput),
        goodput=goodput_rows(goodput),
        spikes=[(spike, page_of(run_dir, spike)) for spike in spikes],
        window=WINDOW_STEPS,
        faults=_faults(records),
        memory=_memory(records, result),
        precision=_precision(result),
        shares=_shares(result),
        configuration=configuration,
        starts=[(start, changes_of(before, start)) for before, start in zip([None, *starts], starts, strict=False)],
        damage=damage,
    )


def _has_no_sets(configuration: Mapping[str, Sequence[Setting]]) -> bool:
    """Return whether the configuration is known and has no held-out set."""
    return ("evaluation.sets", "[]") in [(each.key, each.value) for each in configuration.get("evaluation", ())]


def _precision(result: Mapping[str, Any]) -> str:
    """Return the precision with the reason for its choice; empty if no reason is recorded."""
    name, reason = result.get("precision", ""), result.get("precision_reason", "")
    if not reason:
        return ""
    return reason if reason.startswith(f"{name}:") else f"Precision {name}: {reason}"


def _facts(records: Sequence[Record], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts under the title, without those that are not known yet."""
    facts = []
    if "params" in result:
        total_params, active = result["params"]["total"], result["params"]["active"]
        facts.append(("parameters", format_count(total_params)))
        if active != total_params:
            facts.append(("active per token", format_count(active)))
    if {"world_size", "zero_stage", "precision"} <= result.keys():
        ranks = f"{result['world_size']} rank" + ("s" if result["world_size"] > 1 else "")
        facts.append(("engine", f"{ranks} · ZeRO-{result['zero_stage']} · {result['precision']}"))
    if records:
        facts.append(("steps", f"{records[-1]['step']:,}"))
        facts.append(("samples", format_count(total(records, "samples"))))
        facts.append(("tokens", format_count(total(records, "tokens"))))
        seconds = result.get("train_seconds") or total(records, "seconds")
        facts.append(("training time", format_seconds(seconds)))
    if best := result.get("best"):
        facts.append(("best checkpoint", f"step {best['step']:,}, {best['metric']} {best['value']:.4g}"))
    if early := result.get("early_stop"):
        facts.append(("ended early", early["reason"]))
    if result.get("machine"):
        facts.append(("machine", result["machine"]))
    return facts


def _cards(result: Mapping[str, Any]) -> list[HeldoutCard]:
    return [_card(name, score_record) for name, score_record in result.get("heldout", {}).items()]


def _card(name: str, score_record: Mapping[str, Any]) -> HeldoutCard:
    if score_record.get("kind") == "perplexity":
        per_byte = score_record["bits_per_byte"]
        about = f"loss {score_record['loss']:.4f} ± {score_record['error']:.4f}"
        about += f" · {per_byte:.3f} bits per byte" if per_byte is not None else ""
        samples = f"{score_record['n']:,} documents, {score_record['tokens']:,} tokens"
        return HeldoutCard(name, score_record["metric"], samples, f"{score_record['perplexity']:.4g}", "", about, [])
    score, n = score_record["score"], score_record["n"]
    if score_record.get("kind") == "generation":
        about = f"± {100 * score_record['error']:.1f} · answers in {ANSWERS_FOLDER}/{name}.jsonl"
        if score_record["control"] is not None:
            about = f"{about} · {100 * score_record['control']:.1f} with answers permuted"
        return HeldoutCard(name, score_record["metric"], f"{n:,} samples", f"{100 * score:.1f}", "", about, [])
    bars = [Bar("model", score, score_record.get("error", binomial_error(score, n)), 1)]
    about = f"{score / score_record['chance']:.1f}× chance"
    if "control" in score_record:
        control = score_record["control"]
        bars.append(Bar("permuted", control, score_record.get("control_error", binomial_error(control, n)), 3))
        about = f"{score / control:.1f}× its control" if control else "control: none right"
    bars.append(Bar("chance", score_record["chance"], 0.0, 0))
    if score_record.get("kind") == "drawings":
        about += f" · Frechet distance {score_record['frechet']:.3f} (real images {score_record['frechet_real']:.3f})"
        copies = score_record["near_copies"]
        about += (
            f" · {100 * copies:.0f} % nearer to a training image than 19 of 20 real ones" if copies is not None else ""
        )
    return HeldoutCard(name, score_record["metric"], f"{n:,} samples", f"{100 * score:.1f}", "%", about, bars)


def _galleries(run_dir: Path, records: Sequence[CaptionRecord]) -> list[CaptionGallery]:
    galleries = []
    for name, group in groupby(records, key=lambda record: record.set):
        tiles = [
            CaptionedImage(data_url(run_dir, record.image), record.expected, record.generated, record.right)
            for record in group
        ]
        galleries.append(CaptionGallery(name, sum(tile.right for tile in tiles), tiles))
    return galleries


def _loss_unit(records: Sequence[Record]) -> str:
    """Return the unit of the mean loss. Only records of contrastive stages have a similarity scale."""
    if any("metric/psnr" in record for record in records):
        return "mean per image"
    is_per_pair = ["metric/similarity_scale" in record for record in records]
    if any(is_per_pair):
        return "mean per pair" if all(is_per_pair) else "mean per token, in contrastive stages per pair"
    return "mean per token"


def _charts(records: Sequence[Record], spikes: Sequence[tuple[int, str]]) -> list[Chart]:
    if not records:
        return []
    stages = stage_marks(records)
    marks = stage_names(stages)
    bad = int(np.isnan(column(records, "loss")).sum())
    skipped = sum(record.get("applied") is False for record in records)
    loss_note = _join(_loss_unit(records), f"{_steps(bad)} without a finite loss" if bad else "")
    norm_note = _join("before clipping", f"{_steps(skipped)} skipped" if skipped else "")
    wait = _smoothed(data_wait_percent(records), 4)
    return [
        Chart("Loss", loss_note, _smoothed(series(records, "loss"), 1), marks=marks, links=spikes),
        *_modality_charts(records, marks),
        *heldout_charts(records, marks),
        *tokenizer_charts(records, marks),
        Chart("Learning rate", "by component", _learning_rates(records), from_zero=True, marks=marks),
        Chart("Gradient norm", norm_note, _smoothed(series(records, "grad_norm"), 2), marks=marks),
        Chart("Tokens per second", "all ranks", _smoothed(rate(records, "tokens"), 3), from_zero=True, marks=marks),
        Chart("Data wait", "share of a step spent waiting for the loader", wait, unit="%", from_zero=True, marks=marks),
        *step_charts(records, stages),
    ]


def _modality_charts(records: Sequence[Record], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    """Return the chart of the losses of text and of image codes; none for a model that does not draw."""
    lines = [
        Line(label, thin(smooth(series(records, f"metric/cross_entropy_{name}")), 300), colour)
        for colour, (name, label) in enumerate((("text", "text and marks"), ("image", "codes of images")), 1)
    ]
    chart = Chart("Loss of text and of images", "cross-entropy, weighted mean per token, smoothed", lines, marks=marks)
    return [] if chart.is_empty else [chart]


def _smoothed(points: Sequence[Point], colour: int) -> list[Line]:
    return [Line("each step", thin(points), colour, faint=True), Line("smoothed", thin(smooth(points), 300), colour)]


def _learning_rates(records: Sequence[Record]) -> list[Line]:
    """Return one line per component. Components with equal curves share a line; otherwise one would hide the others."""
    names: dict[tuple[Point, ...], list[str]] = {}
    for key in [key for key in records[-1] if key.startswith("lr/")] or ["lr"]:
        names.setdefault(tuple(thin(series(records, key))), []).append(key.removeprefix("lr/"))
    return [
        Line(", ".join(sharing), points, colour=number % 5 + 1)
        for number, (points, sharing) in enumerate(names.items())
    ]


def _steps(count: int) -> str:
    return f"{count} step" + ("" if count == 1 else "s")


def _join(*notes: str) -> str:
    return " · ".join(note for note in notes if note)


def _throughput(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return overall rates. The time of a step is a median, because the first steps of a process are slow."""
    known = column(records, "seconds")
    seconds = known[known > 0].tolist()
    if not seconds:
        return []
    spent = sum(seconds)
    return [
        ("tokens per second", format_count(total(records, "tokens") / spent)),
        ("samples per second", format_count(total(records, "samples") / spent)),
        ("seconds per step, median", f"{statistics.median(seconds):.3g}"),
        ("slowest step", f"{max(seconds):.3g} s"),
        ("waiting for data", f"{100 * total(records, 'data_wait_seconds') / spent:.1f}%"),
        *step_rows(records),
    ]


def _faults(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the number of skipped samples by kind, and their share of all samples read; empty if there are none."""
    kinds = sorted({key for record in records for key in record if key.startswith("faults/")})
    totals = {kind.removeprefix("faults/"): int(total(records, kind)) for kind in kinds}
    left_out = sum(totals.values())
    if not left_out:
        return []
    share = 100 * left_out / (left_out + total(records, "samples"))
    rows = [(kind, f"{count:,}") for kind, count in totals.items()]
    return [*rows, ("share of all samples", f"{share:.2g}%")]


def _memory(records: Sequence[Record], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    memory = result.get("memory") or {}
    rows = [(f"rank {rank}, host", _bytes(size)) for rank, size in enumerate(memory.get("rss_bytes") or ())]
    rows += [(f"rank {rank}, device", _bytes(size)) for rank, size in enumerate(memory.get("device_bytes") or ())]
    peaks = _known(records, "peak_rss_bytes")
    rows = rows or ([("rank 0, host", _bytes(max(peaks)))] if peaks else [])
    for phase in ("forward", "backward", "optimizer"):
        marks = _known(records, f"{phase}_peak_bytes")
        rows += [(f"rank 0, in {phase}", _bytes(max(marks)))] if marks else []
    return rows


def _known(records: Sequence[Record], key: str) -> list[float]:
    values = column(records, key)
    return values[values > 0].tolist()


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _wall_time(goodput: Goodput | None) -> list[ShareBar]:
    return [
        ShareBar(name, round(seconds), 100 * share, number % 5 + 1)
        for number, (name, seconds, share) in enumerate(goodput_shares(goodput))
    ]


def _shares(result: Mapping[str, Any]) -> list[ShareBar]:
    components = result.get("params", {}).get("components") or {}
    total_params = sum(components.values())
    return [
        ShareBar(name, count, 100 * count / total_params, number % 5 + 1)
        for number, (name, count) in enumerate(sorted(components.items(), key=lambda item: -item[1]))
        if total_params
    ]
