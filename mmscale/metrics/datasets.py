"""Figures of each data set of a mixture: which one is learned, which one is damaged.

    totals(batch, losses, names) --sum over ranks--> figures(names, sums)

Not for: what the model as a whole does (``run_log``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data_pipeline.loader.loader import StepBatch

_TOTALS = 5
"""Loss, weight, samples, tokens, skipped samples."""


def totals(batch: StepBatch, losses: Sequence[Sequence[float]], names: Sequence[str]) -> list[float]:
    """Sums of one rank and step, five for each data set: loss, weight, samples, tokens, skipped samples.

    Args:
        batch: The step.
        losses: ``StepReport.document_losses``; empty if nothing was trained.
        names: Data sets, the same on every rank.
    """
    sums = {name: [0.0] * _TOTALS for name in names}
    for number, microbatch in enumerate(batch.microbatches):
        bounds = microbatch.segments.bounds
        weights = torch.segment_reduce(microbatch.loss_weights, "sum", offsets=microbatch.segments.cu.long()).tolist()
        for segment, origin in enumerate(microbatch.provenance):
            if origin is None:
                continue
            row = sums[origin.dataset]
            row[0] += losses[number][segment] if losses else 0.0
            row[1] += weights[segment]
            row[2] += 1
            row[3] += bounds[segment + 1] - bounds[segment]
    for skip in batch.skipped:
        sums[skip.dataset][4] += 1
    return [value for name in names for value in sums[name]]


def figures(names: Sequence[str], sums: Sequence[float]) -> dict[str, float | int]:
    """``dataset/NAME/loss`` (a weighted mean, left out without weight), and ``samples``, ``tokens``, ``skipped``."""
    found: dict[str, float | int] = {}
    for i, name in enumerate(names):
        loss, weight, samples, tokens, skipped = sums[_TOTALS * i : _TOTALS * (i + 1)]
        if weight:
            found[f"dataset/{name}/loss"] = loss / weight
        found[f"dataset/{name}/samples"] = int(samples)
        found[f"dataset/{name}/tokens"] = int(tokens)
        found[f"dataset/{name}/skipped"] = int(skipped)
    return found
