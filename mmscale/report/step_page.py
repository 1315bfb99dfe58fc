"""The samples of one step of a run as an HTML page, with images and texts.

The page is one self-contained file. Not for: finding the samples (``mmscale.run.sample_lookup``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipeline.history.sample_lookup import SampleDescription
from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.report.page import render_page


@dataclass(frozen=True)
class StepPage:
    """The content of the page.

    Attributes:
        run: The run folder, as the user named it.
        step: Number of the step.
        facts: (name, value) pairs for the top of the page.
        samples: The samples, sorted by lane and position in the pack.
        skipped: Records of the samples that were skipped.
        notes: Notes about the whole page.
    """

    run: str
    step: int
    facts: Sequence[tuple[str, str]]
    samples: Sequence[SampleDescription]
    skipped: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _PackSection:
    """The part of the page for one lane."""

    lane: int
    tokens: int
    samples: tuple[SampleDescription, ...]


def write_step_page(path: Path, page: StepPage) -> Path:
    """Write the page atomically, and return its path. Creates missing folders."""
    packs = []
    for lane, group in groupby(page.samples, key=lambda sample: sample.row.lane):
        samples = tuple(group)
        packs.append(_PackSection(lane, sum(sample.row.tokens for sample in samples), samples))
    text = render_page(Path(__file__).with_name("step.html.jinja"), page=page, packs=packs)
    write_whole(path, as_utf8(text), parents=True)
    return path
