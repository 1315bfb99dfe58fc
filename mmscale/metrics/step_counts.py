"""Counts of one step by name. Each rank counts its own part. The loop sums the counts over ranks for the metrics.

document_stats --> count_step --+
                                +--dist.all_reduce_sum--> step_metrics --> metrics.jsonl
step_flops ---------------------+
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from data_pipeline.errors import FaultKind
from data_pipeline.loader.loader import StepBatch
from data_pipeline.media_spec import IMAGE
from mmscale.engine.engine import Engine, StepReport
from mmscale.models.flops import training_flops

_DATASET_COUNTS = ("loss_sum", "loss_weight", "samples", "tokens", "skipped")


class DocumentStats(NamedTuple):
    """A document of a step: data set, tokens, loss weight, and weighted loss sum (None if it was not computed)."""

    dataset: str
    tokens: int
    weight: float
    loss_sum: float | None


def document_stats(batch: StepBatch, losses: Sequence[Sequence[float]]) -> list[DocumentStats]:
    """Return the documents of a step in the order of the microbatches, without dummy documents.

    Args:
        batch: The step.
        losses: ``StepReport.document_losses``; empty for a step without loss weight.
    """
    documents: list[DocumentStats] = []
    for number, microbatch in enumerate(batch.microbatches):
        bounds = microbatch.segments.bounds
        weights = torch.segment_reduce(microbatch.loss_weights, "sum", offsets=microbatch.segments.cu.long()).tolist()
        for segment, origin in enumerate(microbatch.provenance):
            if origin is not None:
                tokens, loss = bounds[segment + 1] - bounds[segment], losses[number][segment] if losses else None
                documents.append(DocumentStats(origin.dataset, tokens, weights[segment], loss))
    return documents


def count_step(batch: StepBatch, documents: Sequence[DocumentStats], datasets: Sequence[str]) -> dict[str, float]:
    """Count the documents, tokens, images and faults of this rank in a step.

    Args:
        batch: The step.
        documents: ``document_stats`` of the step.
        datasets: Names of the data sets, the same on every rank.

    Returns:
        The same names in the same order on every rank: ``tokens``, ``samples``, ``cut_documents``, ``learned_tokens``,
        ``images``, ``clips/NAME`` for each further modality, ``faults/KIND`` and, for each data set, ``dataset/NAME/``
        with ``loss_sum``, ``loss_weight``, ``samples``, ``tokens`` and ``skipped``.
    """
    counts: dict[str, float] = {
        "tokens": batch.num_tokens,
        "samples": batch.num_samples,
        "cut_documents": batch.num_cut,
        "learned_tokens": sum(int(microbatch.loss_weights.count_nonzero()) for microbatch in batch.microbatches),
        "images": sum(microbatch.num_inputs(IMAGE) for microbatch in batch.microbatches),
    }
    for name in sorted(batch.microbatches[0].media.keys() - {IMAGE}):  # The same on all ranks.
        counts[f"clips/{name}"] = sum(microbatch.num_inputs(name) for microbatch in batch.microbatches)
    counts |= {f"faults/{kind.value}": 0 for kind in FaultKind}
    counts |= {f"dataset/{name}/{count}": 0 for name in datasets for count in _DATASET_COUNTS}
    for document in documents:
        counts[f"dataset/{document.dataset}/loss_sum"] += document.loss_sum or 0.0
        counts[f"dataset/{document.dataset}/loss_weight"] += document.weight
        counts[f"dataset/{document.dataset}/samples"] += 1
        counts[f"dataset/{document.dataset}/tokens"] += document.tokens
    for skip in batch.skipped:
        counts[f"faults/{skip.kind.value}"] += 1
        counts[f"dataset/{skip.dataset}/skipped"] += 1
    return counts


def step_flops(engine: Engine, microbatches: Sequence[Any]) -> dict[str, float]:
    """Return ``model_flops`` and ``hardware_flops`` of this rank's microbatches, which must be on the host.

    Both include teachers. ``hardware_flops`` also includes the operations that activation checkpointing repeats, and
    those of the objective's first forward pass over all microbatches, if it needs one.
    """
    model: Any = engine.model
    trained, recompute = engine.trained_components, engine.config.activation_checkpointing
    twice = engine.runs_forward_twice(len(microbatches))
    counts = [
        training_flops(model.config, part, trained, recompute=recompute, forward_twice=twice) for part in microbatches
    ]
    counts += [teacher.flops(part) for teacher in engine.teachers for part in microbatches]
    model_flops = sum(count.forward + count.backward for count in counts)
    again = sum(count.recomputed for count in counts)
    return {"model_flops": float(model_flops), "hardware_flops": float(model_flops + again)}


def step_metrics(report: StepReport, sums: Mapping[str, float], datasets: Sequence[str]) -> dict[str, float | int]:
    """Return the metrics of a step that follow from its counts and from its report.

    A data set's loss is the mean over its tokens, weighted by their loss weights, and absent without weight. A kind of
    fault is absent if its count is 0. Seconds and peak bytes of the phases, and the components' gradient norms, come
    from ``report``.

    Args:
        report: Report of the step on this rank.
        sums: ``count_step`` and ``step_flops``, summed over all ranks.
        datasets: Names of the data sets.
    """
    names = ["cut_documents", "learned_tokens", "images", "model_flops", "hardware_flops"]
    names += [name for name in sums if name.startswith("clips/")]
    metrics: dict[str, float | int] = {name: int(sums[name]) for name in names}
    metrics |= {f"{name}_seconds": value for name, value in report.spans.seconds.items()}
    metrics |= {f"{name}_peak_bytes": value for name, value in report.spans.peak_bytes.items()}
    metrics |= {f"grad_norm/{name}": norm for name, norm in report.component_grad_norms.items()}
    faults = {name: int(count) for name, count in sums.items() if name.startswith("faults/") and count}
    metrics |= {"skipped_samples": sum(faults.values()), **faults}
    for name in (f"dataset/{dataset}" for dataset in datasets):
        if weight := sums[f"{name}/loss_weight"]:
            metrics[f"{name}/loss"] = sums[f"{name}/loss_sum"] / weight
        metrics |= {f"{name}/{count}": int(sums[f"{name}/{count}"]) for count in ("samples", "tokens", "skipped")}
    return metrics
