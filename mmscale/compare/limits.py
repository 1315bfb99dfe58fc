"""What a comparison does not show, in sentences that follow from what was run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mmscale.compare.config import Comparison, Equal
from mmscale.compare.figures import VariantFigures
from mmscale.compare.interval import t_quantile
from mmscale.compare.plan import Trial
from mmscale.compare.runs import Failure
from mmscale.metrics.format import format_count

_FEW_SEEDS = 5
_MISSED = 0.01
"""A budget that is missed by more than this share is told."""


def limits(
    comparison: Comparison,
    trials: Sequence[Trial],
    variants: Sequence[VariantFigures],
    start: Mapping[str, Mapping[str, bool]],
    failures: Sequence[Failure],
) -> list[str]:
    """The sentences, the most important ones first.

    Args:
        comparison: What was asked.
        trials: The runs that were planned.
        variants: What is there.
        start: ``start.alike``.
        failures: Runs that ended without a result.
    """
    return [
        *_missing(comparison, trials, variants, failures),
        *_scope(comparison, variants),
        *_seeds(comparison, variants),
        *_budget(comparison, variants),
        *_batches(comparison, trials),
        *_start(comparison, start),
        _recipe(comparison),
        *_machines(variants),
    ]


def _missing(
    comparison: Comparison, trials: Sequence[Trial], variants: Sequence[VariantFigures], failures: Sequence[Failure]
) -> Iterator[str]:
    done = {(run.variant, run.seed) for each in variants for run in each.runs}
    failed = {(failure.variant, failure.seed) for failure in failures}
    for failure in failures:
        yield f"{failure.variant}, seed {failure.seed}, failed (exit code {failure.exit_code}) and is in no figure."
    open_runs = [t.name for t in trials if (t.variant, t.seed) not in done | failed]
    if open_runs:
        yield f"Not finished yet: {'; '.join(open_runs)}. Figures are those of the runs that are."


def _scope(comparison: Comparison, variants: Sequence[VariantFigures]) -> Iterator[str]:
    run = comparison.variants[0].run
    names = dict.fromkeys(d.name for number in range(len(run.stages)) for d in run.stage_data(number).datasets)
    sets = [held.name for held in run.evaluation.sets]
    runs = [each for variant in variants for each in variant.runs]
    if not runs:
        return
    sizes = _span([each.params["total"] for each in runs])
    learned, flops = _span([each.learned_tokens for each in runs]), _span([each.flops for each in runs])
    asked = f"asked about {', '.join(sets)}" if sets else "with no held-out set"
    yield (
        f"These are models of {sizes} parameters, trained on {', '.join(names)} for {learned} learned tokens "
        f"({flops} operations) a run, {asked}. Other data, larger models and longer training may rank otherwise."
    )


def _span(values: Sequence[float]) -> str:
    low, high = format_count(min(values)), format_count(max(values))
    return low if low == high else f"{low} to {high}"


def _seeds(comparison: Comparison, variants: Sequence[VariantFigures]) -> Iterator[str]:
    n = max((len(each.runs) for each in variants), default=0)
    if n == 1:
        yield "One seed: there are no intervals, and a difference may be chance."
    if n < 2:
        return
    confidence = comparison.settings.confidence
    factor = t_quantile(confidence, n - 1) / math.sqrt(n)
    few = " With so few seeds the spread itself is hardly known." if n < _FEW_SEEDS else ""
    yield (
        f"Intervals are {100 * confidence:g}% Student t intervals of the mean over {n} seeds ({factor:.2f} standard "
        f"deviations to either side). They cover the draw of the seed, not that of the questions, for which each "
        f"score has its binomial standard error beside it.{few}"
    )
    if any(held.n for each in variants for held in each.heldout.values()):
        yield "Differences are taken seed by seed; several are looked at, and nothing is corrected for that."


def _budget(comparison: Comparison, variants: Sequence[VariantFigures]) -> Iterator[str]:
    if len(variants) < 2:
        return
    equal = comparison.settings.equal

    def ratios(by: Equal) -> list[tuple[str, float]]:
        first = variants[0].median(lambda run: run.learned_tokens if by is Equal.TOKENS else run.flops)
        return [
            (each.name, each.median(lambda run: run.learned_tokens if by is Equal.TOKENS else run.flops) / first)
            for each in variants[1:]
        ]

    words = {Equal.TOKENS: "learned tokens", Equal.FLOPS: "operations"}
    other = Equal.FLOPS if equal is Equal.TOKENS else Equal.TOKENS
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(other))
    yield f"{words[equal].capitalize()} are equal; {words[other]} follow: {told} times those of {variants[0].name}."
    for name, ratio in ratios(equal):
        if abs(ratio - 1) > _MISSED:
            yield f"{name} had {100 * (ratio - 1):+.1f}% {words[equal]}: a run ends with a whole step."


def _batches(comparison: Comparison, trials: Sequence[Trial]) -> Iterator[str]:
    parted = {t.variant: t.parts_after for t in trials if t.parts_after is not None}
    if not parted:
        yield "Every variant saw the same samples in the same order, cut into the same batches, from each seed."
        return
    sizes = {t.variant: t.stages[0].samples / t.stages[0].steps for t in trials}
    told = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())
    yield (
        f"Batches are not the same: those of {', '.join(parted)} part from those of {comparison.variants[0].name} "
        f"({told} samples a step). Close packs by data.packing.max_documents, with look_ahead 1 and max_tokens out of "
        "the way, to give all of them the same ones."
    )


def _start(comparison: Comparison, start: Mapping[str, Mapping[str, bool]]) -> Iterator[str]:
    first, *others = start.items()
    shared = [name for name in first[1] if all(found.get(name, False) for _, found in others)]
    own = list(dict.fromkeys(name for _, found in start.items() for name in found if name not in shared))
    alike = (
        f"{_and(shared)} begin{'s' if len(shared) == 1 else ''} with the same bits" if shared else "Nothing is alike"
    )
    differ = f"; {_and(own)} differ{'s' if len(own) == 1 else ''} by construction" if own else ""
    yield f"From each seed {alike} in every variant{differ}." if shared else f"{alike} at the start{differ}."


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _recipe(comparison: Comparison) -> str:
    plain = [[s.model_copy(update={"steps": 1, "warmup_steps": 0}) for s in v.run.stages] for v in comparison.variants]
    if all(stages == plain[0] for stages in plain):
        return "All variants have the same learning rates and optimizer; these were tuned for none of them."
    return "Learning rates or optimizers differ between variants, as their overrides say."


def _machines(variants: Sequence[VariantFigures]) -> Iterator[str]:
    runs = [run for each in variants for run in each.runs]
    machines = dict.fromkeys(f"{run.machine}, {run.precision}" for run in runs)
    if len(machines) > 1:
        yield f"Times and memory do not compare: runs were on different machines or ranks ({'; '.join(machines)})."
    elif machines:
        yield (
            f"Times and memory are those of {next(iter(machines))}, medians over steps; on a CPU memory is that of the "
            "whole process. Other work on the machine shows in the times."
        )
