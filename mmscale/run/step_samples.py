"""Write pages with the samples of steps, for ``mmscale data trace --html`` and for the spikes that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import DataPipelineError
from data_pipeline.history.sample_log import LogRow
from data_pipeline.history.sample_lookup import SampleDescription
from mmscale.errors import MMScaleError
from mmscale.metrics.metrics_file import read_metrics
from mmscale.report.spikes import find_spikes
from mmscale.report.step_page import StepPage, write_step_page
from mmscale.run.sample_lookup import SampleLookup, StepSamples

MAX_SAMPLES_WITH_IMAGES = 400
MAX_IMAGES_PER_SAMPLE = 12
_SPIKE_SAMPLES = 24
"""Documents on the page of a spike: those with the highest losses."""


def write_samples_page(
    path: Path, run: Path, found: StepSamples, samples: Sequence[SampleDescription], notes: Sequence[str] = ()
) -> Path:
    """Write the page of a step and return its path.

    Args:
        path: The HTML file.
        run: The run folder, as the page shows it.
        found: The step.
        samples: The documents on the page.
        notes: Notes about the page.
    """
    losses = [row.loss for row in found.rows if row.loss is not None]
    facts = [
        ("stage", found.stage),
        ("lanes", f"{len({row.lane for row in found.rows}):,}"),
        ("documents", f"{len(found.rows):,}"),
        ("tokens", f"{sum(row.tokens for row in found.rows):,}"),
        ("losses", f"{min(losses):.3f} to {max(losses):.3f}" if losses else "not logged"),
        ("source", "sample log" if found.replayed_from is None else f"replay from step {found.replayed_from}"),
    ]
    return write_step_page(path, StepPage(str(run), found.step, facts, samples, found.skipped, notes))


def write_spike_pages(run: Path, note: Callable[[str], object]) -> None:
    """Write a page with the samples of each step whose loss is a spike, next to the report that links to it.

    The pages are made from the sample log and the data; a step that is not logged is left out, and so is every page if
    the data are gone. No code of a data set runs.

    Args:
        run: The run folder.
        note: Called with a message for each page that cannot be written.
    """
    try:
        spikes = find_spikes(read_metrics(run / "metrics.jsonl"))
        lookup = SampleLookup(run) if spikes else None
    except (MMScaleError, DataPipelineError, OSError) as error:
        note(f"no pages of loss spikes: {error}")
        return
    for spike in spikes if lookup is not None else ():
        assert lookup is not None
        if lookup.sample_log.number_of(spike.step) is None:
            continue
        try:
            _write_spike_page(run / spike.page, run, lookup, spike.step)
        except (MMScaleError, DataPipelineError, OSError) as error:
            note(f"no page of the loss spike at step {spike.step}: {error}")


def _write_spike_page(path: Path, run: Path, lookup: SampleLookup, step: int) -> None:
    found = lookup.samples_of(step)
    highest = sorted(found.rows, key=_by_loss)[:_SPIKE_SAMPLES]
    rows = sorted(highest, key=lambda row: (row.lane, row.place))
    catalog = lookup.catalog(lookup.loader_of(step))
    try:
        samples = [catalog.describe(row, MAX_IMAGES_PER_SAMPLE) for row in rows]
    finally:
        catalog.close()
    command = f"mmscale data trace RUN --step {step} --html FILE"
    notes = [f"The {len(rows)} documents with the highest losses. All of them: {command}"]
    write_samples_page(path, run.resolve(), found, samples, notes if len(rows) < len(found.rows) else [])


def _by_loss(row: LogRow) -> tuple[bool, float]:
    """Order documents by falling loss; those without a loss are last."""
    return (row.loss is None, -(row.loss or 0.0))
