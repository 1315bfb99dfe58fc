"""``mmscale data trace``: which samples a step had, and which steps a sample had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mmscale.cli.console import emit, progress

if TYPE_CHECKING:
    from data_pipeline.history.sample_lookup import Shown
    from mmscale.run.sample_lookup import RunTrace, Sighting, StepTrace

app = typer.Typer()

_SHOWN_TEXT = 100
_MAX_ROWS_WITH_PICTURES = 400
_MAX_PICTURES_OF_A_ROW = 12


@app.command(epilog="Example: mmscale data trace runs/quickstart --step 100 --html step.html")
def trace(
    run: Path = typer.Argument(help="A run folder, finished or not.", metavar="RUN"),
    step: int | None = typer.Option(None, "--step", min=1, help="List the samples of this step, as in metrics.jsonl."),
    lane: list[int] = typer.Option([], "--lane", min=0, help="Only this lane; may be repeated."),
    html: Path | None = typer.Option(None, "--html", help="Write a page with pictures and texts."),
    sample: str | None = typer.Option(None, "--sample", help="List the steps of this sample.", metavar="SHARD/KEY"),
    until: int | None = typer.Option(None, "--until", min=1, help="With --sample: find its steps up to this one."),
    json: bool = typer.Option(False, "--json", help="One JSON object instead of lines."),
) -> None:
    """List the samples of a step, or the steps of a sample, from the run folder and the manifests."""
    from mmscale.run.sample_lookup import RunTrace

    if (step is None) == (sample is None):
        raise typer.BadParameter("give either --step N or --sample SHARD/KEY", param_hint="--step")
    if step is None and (lane or html is not None):
        raise typer.BadParameter("--lane and --html go with --step", param_hint="--sample")
    if step is not None and until is not None:
        raise typer.BadParameter("--until goes with --sample", param_hint="--until")
    opened = RunTrace(run)
    if step is not None:
        _print_step(opened, run, step, lane or None, html, json)
    else:
        _print_sample(opened, str(sample), until, json)


def _print_step(opened: RunTrace, run: Path, step: int, lanes: list[int] | None, html: Path | None, json: bool) -> None:
    found = _with_progress("replay", lambda advance: opened.step(step, lanes, advance))
    samples = opened.samples(opened.frame(step))
    limit = _MAX_PICTURES_OF_A_ROW if html is not None else 0
    shown = []
    with progress("read", len(found.rows)) as meter:
        for number, row in enumerate(found.rows):
            shown.append(samples.show(row, limit if number < _MAX_ROWS_WITH_PICTURES else 0))
            meter.advance()
    samples.close()
    if html is not None:
        _write_page(html, run, found, shown)
    if json:
        rows = [_record(entry) for entry in shown]
        head = {"step": step, "stage": found.stage, "source": found.source.value, "replayed_from": found.replayed_from}
        emit({**head, "rows": rows, "skipped": [dict(record) for record in found.skipped]}, json=True)
        return
    print(_headline(found))
    for entry in shown:
        print(_line(entry))
    for record in found.skipped:
        print(f"left out: lane {record['lane']} {record['shard']}/{record['key']}: {record['reason']}")
    if html is not None:
        print(html)


def _with_progress(what: str, work: Callable[[Callable[[int], object]], Any]) -> Any:
    """Runs ``work`` with a bar that shows from the first step on that is replayed."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        meters: list[Any] = []

        def advance(count: int) -> None:
            if not meters:
                meters.append(stack.enter_context(progress(what)))
            meters[0].advance(count)

        return work(advance)


def _headline(found: StepTrace) -> str:
    lanes = len({row.lane for row in found.rows})
    text = f"step {found.step} ({found.stage}): documents {len(found.rows)}, lanes {lanes}; "
    if found.replayed_from is None:
        return text + "as written down when it was done"
    return text + f"replayed from the snapshot of step {found.replayed_from}: true unless an image proves damaged"


def _line(entry: Shown) -> str:
    row = entry.row
    loss = "" if row.loss is None else f"  loss {row.loss:.3f}"
    part = f" part {row.part}" if row.part else ""
    text = entry.text if len(entry.text) <= _SHOWN_TEXT else entry.text[: _SHOWN_TEXT - 1] + "…"
    where = f"{entry.shard or '?'}/{entry.key or f'? (sample {row.sample})'}"
    about = f"lane {row.lane} place {row.place}  {row.dataset} epoch {row.epoch}{part}  {row.tokens} tokens{loss}"
    return "  ".join([about, where, *([text] if entry.stretches is not None else []), *(f"({n})" for n in entry.notes)])


def _record(entry: Shown) -> dict[str, Any]:
    text = None if entry.stretches is None else entry.text
    return {**entry.row._asdict(), "shard": entry.shard, "key": entry.key, "text": text, "notes": list(entry.notes)}


def _write_page(path: Path, run: Path, found: StepTrace, shown: list[Shown]) -> None:
    from mmscale.report.trace_page import TracePage, write_trace_page

    losses = [entry.row.loss for entry in shown if entry.row.loss is not None]
    facts = [
        ("stage", found.stage),
        ("lanes", f"{len({entry.row.lane for entry in shown}):,}"),
        ("documents", f"{len(shown):,}"),
        ("tokens", f"{sum(entry.row.tokens for entry in shown):,}"),
        ("losses", f"{min(losses):.3f} to {max(losses):.3f}" if losses else "not logged"),
        ("known", "written down" if found.replayed_from is None else f"replayed from step {found.replayed_from}"),
    ]
    notes = []
    if len(shown) > _MAX_ROWS_WITH_PICTURES:
        notes.append(f"Pictures of the first {_MAX_ROWS_WITH_PICTURES} documents only; --lane shows those of a lane.")
    write_trace_page(path, TracePage(str(run), found.step, facts, shown, found.skipped, notes))


def _print_sample(opened: RunTrace, name: str, until: int | None, json: bool) -> None:
    shard, key = _parse_sample(name)
    found: list[Sighting] = _with_progress("replay", lambda advance: list(opened.sample(shard, key, until, advance)))
    if json:
        emit(
            {"sample": name, "steps": [_sighting(one) for one in found], "ledger_until": opened.ledger.last_step},
            json=True,
        )
        return
    for one in found:
        row = one.row
        place = "" if row is None else f" place {row.place}" + (f" part {row.part}" if row.part else "")
        loss = "" if row is None or row.loss is None else f"  loss {row.loss:.3f}"
        about = f"{one.dataset} epoch {one.epoch} lane {one.lane}{place}{loss}"
        step = f"about {one.step}" if one.source.value == "estimate" else str(one.step)
        print(f"step {step}  {about}  {one.source.value}" + (f"  left out: {one.skipped}" if one.skipped else ""))
    if not found:
        print(f"in no step up to {max(opened.ledger.last_step, until or 0)}")


def _parse_sample(name: str) -> tuple[str, str]:
    shard, tar, key = name.partition(".tar/")
    if not tar or not shard or not key:
        raise typer.BadParameter(
            f"{name!r}: expected SHARD/KEY, for example shards/x-00000.tar/000123", param_hint="--sample"
        )
    return f"{shard}.tar", key


def _sighting(one: Sighting) -> dict[str, Any]:
    place = (
        {}
        if one.row is None
        else {"place": one.row.place, "part": one.row.part, "tokens": one.row.tokens, "loss": one.row.loss}
    )
    head = {"step": one.step, "dataset": one.dataset, "epoch": one.epoch, "lane": one.lane, "source": one.source.value}
    return {**head, **place, **({"skipped": one.skipped} if one.skipped else {})}
