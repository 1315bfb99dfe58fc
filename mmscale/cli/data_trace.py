"""``mmscale data trace``: the samples of a step, and the steps of a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import emit, progress, track

if TYPE_CHECKING:
    from data_pipeline.history.sample_lookup import SampleDescription
    from mmscale.run.sample_lookup import Occurrence, SampleLookup, StepSamples

app = typer.Typer()

_MAX_TEXT_LENGTH = 100


@app.command(epilog="Example: mmscale data trace runs/quickstart --step 100 --html step.html")
def trace(
    run: Path = typer.Argument(help="Run folder; the run may still be in progress.", metavar="RUN"),
    step: int | None = typer.Option(
        None, "--step", min=1, help="List the samples of this step (numbered as in metrics.jsonl)."
    ),
    lane: list[int] = typer.Option([], "--lane", min=0, help="With --step: list only this lane; may be repeated."),
    html: Path | None = typer.Option(
        None, "--html", help="With --step: also write an HTML page with images and texts to this file."
    ),
    sample: str | None = typer.Option(
        None,
        "--sample",
        help="List the steps of this sample, and an estimate of its next step.",
        metavar="SHARD/KEY",
    ),
    until: int | None = typer.Option(
        None,
        "--until",
        min=1,
        help="With --sample: find the future steps up to this one exactly, by a replay, instead of an estimate.",
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object instead of lines of text."),
) -> None:
    """List the samples of a step, or the steps of a sample, from the run folder and the manifests."""
    from mmscale.run.sample_lookup import SampleLookup

    if (step is None) == (sample is None):
        raise typer.BadParameter("give either --step N or --sample SHARD/KEY", param_hint="--step")
    if step is None and (lane or html is not None):
        raise typer.BadParameter("--lane and --html need --step", param_hint="--sample")
    if step is not None and until is not None:
        raise typer.BadParameter("--until needs --sample", param_hint="--until")
    lookup = SampleLookup(run)
    if step is not None:
        _print_step(lookup, run, step, lane or None, html, json)
    else:
        _print_sample(lookup, str(sample), until, json)


def _print_step(
    lookup: SampleLookup, run: Path, step: int, lanes: list[int] | None, html: Path | None, json: bool
) -> None:
    from mmscale.run.step_samples import MAX_IMAGES_PER_SAMPLE, MAX_SAMPLES_WITH_IMAGES, write_samples_page

    found = _with_progress(lambda advance: lookup.samples_of(step, lanes, advance))
    catalog = lookup.catalog(lookup.loader_of(step))
    limit = MAX_IMAGES_PER_SAMPLE if html is not None else 0
    samples = [
        catalog.describe(row, limit if number < MAX_SAMPLES_WITH_IMAGES else 0)
        for number, row in enumerate(track(found.rows, "read"))
    ]
    catalog.close()
    if html is not None:
        notes = []
        if len(samples) > MAX_SAMPLES_WITH_IMAGES:
            first = f"Only the first {MAX_SAMPLES_WITH_IMAGES} documents have images here"
            notes.append(f"{first}; use --lane to see others.")
        write_samples_page(html, run, found, samples, notes)
    if json:
        rows = [_row_record(sample) for sample in samples]
        head = {"step": step, "stage": found.stage, "source": found.source.value, "replayed_from": found.replayed_from}
        emit({**head, "rows": rows, "skipped": [dict(record) for record in found.skipped]}, json=True)
        return
    print(_headline(found))
    for sample in samples:
        print(_line(sample))
    for record in found.skipped:
        print(f"skipped: lane {record['lane']} {record['shard']}/{record['key']}: {record['reason']}")
    if html is not None:
        print(html)


def _with_progress(work: Callable[[Callable[[int], object]], Any]) -> Any:
    """Run ``work`` with a progress bar, which appears when the first step is replayed."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        meters: list[Any] = []

        def advance(count: int) -> None:
            if not meters:
                meters.append(stack.enter_context(progress("replay")))
            meters[0].advance(count)

        return work(advance)


def _headline(found: StepSamples) -> str:
    lanes = len({row.lane for row in found.rows})
    text = f"step {found.step} ({found.stage}): documents {len(found.rows)}, lanes {lanes}; "
    if found.replayed_from is None:
        return text + "from the sample log"
    return text + f"replayed from the snapshot of step {found.replayed_from}; correct unless an image is damaged"


def _line(sample: SampleDescription) -> str:
    row = sample.row
    loss = "" if row.loss is None else f"  loss {row.loss:.3f}"
    part = f" part {row.part}" if row.part else ""
    text = sample.text if len(sample.text) <= _MAX_TEXT_LENGTH else sample.text[: _MAX_TEXT_LENGTH - 1] + "…"
    name = f"{sample.shard or '?'}/{sample.key or f'? (sample {row.sample})'}"
    about = f"lane {row.lane} place {row.place}  {row.dataset} epoch {row.epoch}{part}  {row.tokens} tokens{loss}"
    texts = [text] if sample.text_spans is not None else []
    return "  ".join([about, name, *texts, *(f"({note})" for note in sample.notes)])


def _row_record(sample: SampleDescription) -> dict[str, Any]:
    text = None if sample.text_spans is None else sample.text
    return {**sample.row._asdict(), "shard": sample.shard, "key": sample.key, "text": text, "notes": list(sample.notes)}


def _print_sample(lookup: SampleLookup, name: str, until: int | None, json: bool) -> None:
    shard, key = _parse_sample(name)
    found: list[Occurrence] = _with_progress(lambda advance: list(lookup.steps_of(shard, key, until, advance)))
    if json:
        steps = [_occurrence_record(occurrence) for occurrence in found]
        emit({"sample": name, "steps": steps, "log_until": lookup.sample_log.last_step}, json=True)
        return
    for occurrence in found:
        print(_occurrence_line(occurrence))
    if not found:
        print(f"in no step up to {max(lookup.sample_log.last_step, until or 0)}")


def _occurrence_line(occurrence: Occurrence) -> str:
    row = occurrence.row
    place = "" if row is None else f" place {row.place}" + (f" part {row.part}" if row.part else "")
    loss = "" if row is None or row.loss is None else f"  loss {row.loss:.3f}"
    about = f"{occurrence.dataset} epoch {occurrence.epoch} lane {occurrence.lane}{place}{loss}"
    source = occurrence.source.value
    step = f"about {occurrence.step}" if source == "estimate" else str(occurrence.step)
    return f"step {step}  {about}  {source}" + (f"  skipped: {occurrence.skipped}" if occurrence.skipped else "")


def _parse_sample(name: str) -> tuple[str, str]:
    shard, tar, key = name.partition(".tar/")
    if not tar or not shard or not key:
        raise typer.BadParameter(
            f"{name!r}: expected SHARD/KEY, for example shards/x-00000.tar/000123", param_hint="--sample"
        )
    return f"{shard}.tar", key


def _occurrence_record(occurrence: Occurrence) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": occurrence.step,
        "dataset": occurrence.dataset,
        "epoch": occurrence.epoch,
        "lane": occurrence.lane,
        "source": occurrence.source.value,
    }
    if (row := occurrence.row) is not None:
        record |= {"place": row.place, "part": row.part, "tokens": row.tokens, "loss": row.loss}
    return {**record, **({"skipped": occurrence.skipped} if occurrence.skipped else {})}
