"""Sentences on the limits of a comparison, derived from its configuration and runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mmscale.compare.config import Comparison, EqualBudget
from mmscale.compare.interval import t_quantile
from mmscale.compare.plan import Trial
from mmscale.compare.runs import Failure
from mmscale.compare.summary import VariantSummary
from mmscale.metrics.format import format_count

_FEW_SEEDS = 5
_BUDGET_TOLERANCE = 0.01
"""Relative deviation from the budget above which the page mentions it."""


def limits(
    comparison: Comparison,
    trials: Sequence[Trial],
    variants: Sequence[VariantSummary],
    start: Mapping[str, Mapping[str, bool]],
    failures: Sequence[Failure],
) -> list[str]:
    """Return the sentences, most important first.

    Args:
        comparison: The comparison.
        trials: The planned runs.
        variants: Summaries of the finished runs.
        start: Result of ``start.same_initial_values``.
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
    comparison: Comparison, trials: Sequence[Trial], variants: Sequence[VariantSummary], failures: Sequence[Failure]
) -> Iterator[str]:
    done = {(run.variant, run.seed) for each in variants for run in each.runs}
    failed = {(failure.variant, failure.seed) for failure in failures}
    for failure in failures:
        yield f"{failure.variant}, seed {failure.seed}, failed (exit code {failure.exit_code}) and is not included."
    open_runs = [t.name for t in trials if (t.variant, t.seed) not in done | failed]
    if open_runs:
        yield f"Not finished yet: {'; '.join(open_runs)}. All values come from the finished runs."


def _scope(comparison: Comparison, variants: Sequence[VariantSummary]) -> Iterator[str]:
    run = comparison.variants[0].run
    names = dict.fromkeys(d.name for number in range(len(run.stages)) for d in run.stage_data(number).datasets)
    sets = [held.name for held in run.evaluation.sets]
    runs = [each for variant in variants for each in variant.runs]
    if not runs:
        return
    sizes = _format_range([each.params["total"] for each in runs])
    learned, flops = _format_range([each.learned_tokens for each in runs]), _format_range([each.flops for each in runs])
    scored = f"scored on {', '.join(sets)}" if sets else "without a held-out set"
    yield (
        f"These are models of {sizes} parameters, trained on {', '.join(names)} for {learned} learned tokens "
        f"({flops} operations) per run, {scored}. Other data, larger models or longer training may change the ranking."
    )


def _format_range(values: Sequence[float]) -> str:
    low, high = format_count(min(values)), format_count(max(values))
    return low if low == high else f"{low} to {high}"


def _seeds(comparison: Comparison, variants: Sequence[VariantSummary]) -> Iterator[str]:
    n = max((len(each.runs) for each in variants), default=0)
    if n == 1:
        yield "One seed: there are no intervals, and a difference may be due to chance."
    if n < 2:
        return
    confidence = comparison.settings.confidence
    factor = t_quantile(confidence, n - 1) / math.sqrt(n)
    few = f" With fewer than {_FEW_SEEDS} seeds the standard deviation itself is uncertain." if n < _FEW_SEEDS else ""
    yield (
        f"Intervals are {100 * confidence:g}% Student t intervals of the mean over {n} seeds ({factor:.2f} standard "
        f"deviations to either side). They cover the variation by seed, not by question; the standard error "
        f"over questions is listed with each score.{few}"
    )
    if any(held.n for each in variants for held in each.heldout.values()):
        yield "Differences are paired by seed, without a correction for multiple comparisons."


def _budget(comparison: Comparison, variants: Sequence[VariantSummary]) -> Iterator[str]:
    if len(variants) < 2:
        return
    equal = comparison.settings.equal

    def ratios(by: EqualBudget) -> list[tuple[str, float]]:
        first = variants[0].median(lambda run: run.learned_tokens if by is EqualBudget.TOKENS else run.flops)
        return [
            (each.name, each.median(lambda run: run.learned_tokens if by is EqualBudget.TOKENS else run.flops) / first)
            for each in variants[1:]
        ]

    words = {EqualBudget.TOKENS: "learned tokens", EqualBudget.FLOPS: "operations"}
    other = EqualBudget.FLOPS if equal is EqualBudget.TOKENS else EqualBudget.TOKENS
    factors = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios(other))
    first = variants[0].name
    yield f"{words[equal].capitalize()} are equal. {words[other].capitalize()}: {factors} times those of {first}."
    for name, ratio in ratios(equal):
        if abs(ratio - 1) > _BUDGET_TOLERANCE:
            yield f"{name} had {100 * (ratio - 1):+.1f}% {words[equal]}, because a run ends with a whole step."


def _batches(comparison: Comparison, trials: Sequence[Trial]) -> Iterator[str]:
    parted = {t.variant: t.parts_after for t in trials if t.parts_after is not None}
    if not parted:
        yield "Every variant saw the same samples in the same order, cut into the same batches, from each seed."
        return
    sizes = {t.variant: t.stages[0].samples / t.stages[0].steps for t in trials}
    per_step = ", ".join(f"{name} {size:.1f}" for name, size in sizes.items())
    yield (
        f"Batches are not the same: those of {', '.join(parted)} differ from those of {comparison.variants[0].name} "
        f"(samples per step: {per_step}). For equal batches limit packs by data.packing.max_documents, with "
        "look_ahead 1 and a max_tokens that no pack reaches."
    )


def _start(comparison: Comparison, start: Mapping[str, Mapping[str, bool]]) -> Iterator[str]:
    first, *others = start.items()
    shared = [name for name in first[1] if all(found.get(name, False) for _, found in others)]
    own = list(dict.fromkeys(name for _, found in start.items() for name in found if name not in shared))
    differ = f"; {_join(own)} differ{'s' if len(own) == 1 else ''} by construction" if own else ""
    if not shared:
        yield f"No component has the same initial values in every variant{differ}."
        return
    start_with = "starts" if len(shared) == 1 else "start"
    yield f"From each seed {_join(shared)} {start_with} with the same bits in every variant{differ}."


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _recipe(comparison: Comparison) -> str:
    apart: dict[str, object] = {"steps": 1, "warmup_steps": 0, "model": None, "upcycle": False}
    plain = [[stage.model_copy(update=apart) for stage in v.run.stages] for v in comparison.variants]
    if all(stages == plain[0] for stages in plain):
        return "All variants have the same learning rates and optimizer, which were not tuned for any of them."
    return "Learning rates or optimizers differ between variants; see their overrides."


def _machines(variants: Sequence[VariantSummary]) -> Iterator[str]:
    runs = [run for each in variants for run in each.runs]
    machines = dict.fromkeys(f"{run.machine}, {run.precision}" for run in runs)
    if len(machines) > 1:
        yield f"Times and memory cannot be compared: runs were on different machines or ranks ({'; '.join(machines)})."
    elif machines:
        yield (
            f"Times and memory are from {next(iter(machines))}; times are medians over steps, and on a CPU memory is "
            "that of the whole process. Other load on the machine affects the times."
        )
