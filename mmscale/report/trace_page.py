"""A step of a run as one HTML file: its packs, with pictures and texts.

Everything is inlined, so the file can be mailed. Not for: finding the rows (``mmscale.run.sample_lookup``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipeline.history.sample_lookup import Shown
from data_pipeline.io.atomic import as_utf8, write_whole
from mmscale.report.page import render_page


@dataclass(frozen=True)
class TracePage:
    """What the page says.

    Attributes:
        run: The run folder, as the user named it.
        step: The step.
        facts: (name, value) pairs for the head of the page.
        shown: The rows, by lane and place.
        skipped: Samples that were left out.
        notes: Sentences about the whole page.
    """

    run: str
    step: int
    facts: Sequence[tuple[str, str]]
    shown: Sequence[Shown]
    skipped: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Pack:
    lane: int
    tokens: int
    cards: tuple[Shown, ...]


def write_trace_page(path: Path, page: TracePage) -> Path:
    """Writes the page, whole or not at all."""
    packs = []
    for lane, group in groupby(page.shown, key=lambda shown: shown.row.lane):
        cards = tuple(group)
        packs.append(_Pack(lane, sum(card.row.tokens for card in cards), cards))
    text = render_page(Path(__file__).with_name("trace.html.jinja"), page=page, packs=packs)
    write_whole(path, as_utf8(text), parents=True)
    return path
