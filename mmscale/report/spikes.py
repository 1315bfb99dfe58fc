"""Steps whose loss is far above that of the steps before, with links to pages of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmscale.report.curves import Record, column

PAGES_FOLDER = "report/steps"
MOST_SPIKES = 5
WINDOW_STEPS = 32
"""Steps before a step that its loss is compared with."""
_MIN_STEPS = 8
_MIN_DEVIATIONS = 6.0
_MIN_RISE = 0.1
"""Least rise over the median, as a share of the median: a smooth curve has tiny deviations."""
_APART_STEPS = 3


@dataclass(frozen=True)
class Spike:
    """A step with an unusual loss.

    Attributes:
        step: Number of the step.
        loss: Its loss; None if it was not finite.
        before: Median loss of the ``WINDOW_STEPS`` steps before.
        deviations: ``(loss - before)`` in robust standard deviations of those steps; infinite without a finite loss.
    """

    step: int
    loss: float | None
    before: float
    deviations: float

    @property
    def page(self) -> str:
        """Path of the page with its samples, relative to the run folder."""
        return f"{PAGES_FOLDER}/step-{self.step:08d}.html"


def find_spikes(records: Sequence[Record]) -> list[Spike]:
    """Return up to ``MOST_SPIKES`` steps with the largest deviations, by step. Among neighbours, the largest counts.

    The scale of the deviations is 1.4826 times the median absolute deviation, which equals the standard deviation for
    normally distributed losses.
    """
    losses = column(records, "loss")
    found: list[Spike] = []
    for index in range(_MIN_STEPS, len(records)):
        window = losses[max(0, index - WINDOW_STEPS) : index]
        known = window[~np.isnan(window)]
        if len(known) < _MIN_STEPS:
            continue
        loss = losses[index]
        # Most steps are below the largest loss of the window: skip their medians.
        if loss <= known.max():
            continue
        before = float(np.median(known))
        scale = 1.4826 * float(np.median(np.abs(known - before)))
        if np.isnan(loss):
            found.append(Spike(int(records[index]["step"]), None, before, np.inf))
        elif loss - before > max(_MIN_DEVIATIONS * scale, _MIN_RISE * abs(before)):
            deviations = (loss - before) / scale if scale else np.inf
            found.append(Spike(int(records[index]["step"]), float(loss), before, float(deviations)))
    chosen: list[Spike] = []
    for spike in sorted(found, key=lambda spike: (-spike.deviations, spike.step)):
        if all(abs(spike.step - other.step) >= _APART_STEPS for other in chosen):
            chosen.append(spike)
    return sorted(chosen[:MOST_SPIKES], key=lambda spike: spike.step)


def page_of(run_dir: Path, spike: Spike) -> str:
    """Return the link from the report to the page of a spike, relative to the run folder; empty if it has no page."""
    return spike.page if (run_dir / spike.page).is_file() else ""
