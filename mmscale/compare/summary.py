"""Summarise finished runs: the results of each run, and of each variant over its seeds.

    RUN/result.json, metrics.jsonl --> RunSummary --over seeds--> VariantSummary --> comparison.json, the page

Everything is read from the run folders, so a summary can be recomputed at any time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mmscale.compare.config import Comparison
from mmscale.compare.interval import Interval, mean_interval
from mmscale.compare.plan import Trial
from mmscale.errors import MMScaleError
from mmscale.evaluate.result import binomial_error, read_result
from mmscale.metrics.metrics_file import read_metrics
from mmscale.report.curves import finite
from mmscale.run.folder import is_finished

_LAST_FRACTION = 10
"""``train_loss`` is the mean over the last 1 / 10 of the steps with a finite loss."""


@dataclass(frozen=True)
class LossCurve:
    """Training loss of a run over its cumulative cost; three sequences of the same length."""

    learned_tokens: tuple[float, ...]
    flops: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class RunTiming:
    """Speed and memory of a run; they depend on the machine.

    Attributes:
        step_seconds: Median seconds of a step.
        samples_per_second, learned_tokens_per_second, tokens_per_second: Medians over the steps, summed over all ranks.
            ``tokens`` are all tokens of the decoder, image tokens included.
        train_seconds: Seconds of all steps together.
        memory_bytes: Largest peak memory of a rank: of its device, or of the process on a CPU.
    """

    step_seconds: float
    samples_per_second: float
    learned_tokens_per_second: float
    tokens_per_second: float
    train_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class RunSummary:
    """Results of one finished run.

    Attributes:
        tokens: All tokens of the decoder, image tokens included.
        learned_tokens: Tokens with a loss.
        flops: Model operations of all forward and backward passes.
        train_loss: Mean loss over the learned tokens of the last tenth of the steps with a finite loss, nats. NaN if no
            loss is finite.
        heldout: ``heldout`` of ``result.json``, by set.
        curve: Training curve. ``comparison.json`` omits it, because ``metrics.jsonl`` has it.
    """

    variant: str
    seed: int
    folder: str
    steps: int
    samples: int
    tokens: int
    learned_tokens: int
    flops: int
    train_loss: float
    heldout: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Any]
    timing: RunTiming
    machine: str
    world_size: int
    precision: str
    curve: LossCurve = field(repr=False)


@dataclass(frozen=True)
class Estimate:
    """A value estimated over the seeds of a variant.

    Attributes:
        mean: Mean over the seeds with its confidence interval.
        difference: Mean difference from the first variant, paired by seed. None for the first variant, and if no seed
            is finished in both.
        asked_error: Standard error over the questions or documents of the set. All seeds get the same questions, so
            more seeds do not reduce it. None for the training loss, and for the loss of a set that has a score.
    """

    mean: Interval
    difference: Interval | None
    asked_error: float | None = None


@dataclass(frozen=True)
class SetSummary:
    """Results of a variant on one held-out set, over its seeds.

    Attributes:
        metric: Description of the task.
        n: Number of questions or documents.
        chance: Accuracy of a random guess; None for documents and for answers in the model's own words.
        control: Mean score with the images or the answers permuted among the samples; None for sets without a control.
        score: Accuracy; None for documents.
        loss: Loss of the right answers or the documents, nats per token. None for contrastive models, and for
            multiple-choice questions in older files.
    """

    metric: str
    n: int
    chance: float | None
    control: float | None
    score: Estimate | None
    loss: Estimate | None


@dataclass(frozen=True)
class VariantSummary:
    """Results of a variant over its finished seeds."""

    name: str
    overrides: tuple[str, ...]
    runs: tuple[RunSummary, ...]
    train_loss: Estimate
    heldout: Mapping[str, SetSummary]

    def median(self, value: Callable[[RunSummary], float]) -> float:
        """Return the median of a value over the runs."""
        return statistics.median(value(run) for run in self.runs)


def read_variants(comparison: Comparison, trials: Sequence[Trial]) -> list[VariantSummary]:
    """Return the variants with at least one finished run, in the order of the comparison."""
    runs = [read_run(trial) for trial in trials if is_finished(trial.config)]
    own = {each.name: [run for run in runs if run.variant == each.name] for each in comparison.variants}
    first, confidence = own[comparison.variants[0].name], comparison.settings.confidence
    return [
        _variant(each.name, each.overrides, own[each.name], first, confidence)
        for each in comparison.variants
        if own[each.name]
    ]


def read_run(trial: Trial) -> RunSummary:
    """Read the results of a finished run.

    Raises:
        MMScaleError: ``result.json`` or ``metrics.jsonl`` is damaged.
    """
    try:
        return _read_run(trial)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise MMScaleError(
            f"{trial.config.run_dir}: result.json or metrics.jsonl lacks a value or holds a wrong one ({error!r}); "
            "remove result.json to let the run finish again"
        ) from error


def _read_run(trial: Trial) -> RunSummary:
    folder = trial.config.run_dir
    result = read_result(folder)
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["learned_tokens"]]
    known = [record for record in records if finite(record["loss"]) is not None]
    last = known[-max(1, len(known) // _LAST_FRACTION) :]
    weight = sum(record["learned_tokens"] for record in last)
    return RunSummary(
        variant=trial.variant,
        seed=trial.seed,
        folder=str(folder),
        steps=result["steps"],
        samples=result["samples"],
        tokens=result["tokens"],
        learned_tokens=sum(record["learned_tokens"] for record in records),
        flops=sum(record["model_flops"] for record in records),
        train_loss=sum(r["loss"] * r["learned_tokens"] for r in last) / weight if last else float("nan"),
        heldout=result["heldout"],
        params=result["params"],
        timing=_timing(result, records),
        machine=result["machine"],
        world_size=result["world_size"],
        precision=result["precision"],
        curve=_curve(records),
    )


def _timing(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> RunTiming:
    def rate(key: str) -> float:
        return statistics.median(record[key] / record["seconds"] for record in records)

    memory = result["memory"]
    return RunTiming(
        step_seconds=statistics.median(record["seconds"] for record in records),
        samples_per_second=rate("samples"),
        learned_tokens_per_second=rate("learned_tokens"),
        tokens_per_second=rate("tokens"),
        train_seconds=result["train_seconds"],
        memory_bytes=max(memory["device_bytes"] or memory["rss_bytes"]),
    )


def _curve(records: Sequence[Mapping[str, Any]]) -> LossCurve:
    points, learned, flops = [], 0, 0
    for record in records:
        learned += record["learned_tokens"]
        flops += record["model_flops"]
        if (loss := finite(record["loss"])) is not None:
            points.append((float(learned), float(flops), loss))
    return LossCurve(*zip(*points, strict=True)) if points else LossCurve((), (), ())


def _variant(
    name: str,
    overrides: tuple[str, ...],
    runs: Sequence[RunSummary],
    first: Sequence[RunSummary],
    confidence: float,
) -> VariantSummary:
    seed_runs = _SeedRuns(runs, {run.seed: run for run in first if run.variant != name}, confidence)
    heldout = {held: _held_out(seed_runs, held) for held in runs[0].heldout}
    return VariantSummary(name, overrides, tuple(runs), seed_runs.estimate(lambda run: run.train_loss), heldout)


@dataclass(frozen=True)
class _SeedRuns:
    """Runs of a variant, and the runs of the first variant by seed (none for the first variant itself)."""

    runs: Sequence[RunSummary]
    partner: Mapping[int, RunSummary]
    confidence: float

    def estimate(self, value: Callable[[RunSummary], float]) -> Estimate:
        pairs = [(run, self.partner[run.seed]) for run in self.runs if run.seed in self.partner]
        differences = [value(a) - value(b) for a, b in pairs]
        mean = mean_interval([value(run) for run in self.runs], self.confidence)
        return Estimate(mean, mean_interval(differences, self.confidence) if differences else None)


def _held_out(seed_runs: _SeedRuns, held: str) -> SetSummary:
    one = seed_runs.runs[0].heldout[held]

    def estimate(key: str) -> Estimate | None:
        return None if one.get(key) is None else seed_runs.estimate(lambda run: run.heldout[held][key])

    score, loss, control = estimate("score"), estimate("loss"), estimate("control")
    # The metric of a set of kind ``generation`` need not be a share of right answers, so its error is not binomial.
    chance = None if one.get("kind") == "generation" else one.get("chance")
    if score is not None and chance is not None:
        score = replace(score, asked_error=binomial_error(score.mean.mean, one["n"]))
    else:
        error = statistics.fmean(run.heldout[held]["error"] for run in seed_runs.runs)
        score = None if score is None else replace(score, asked_error=error)
        loss = None if loss is None else replace(loss, asked_error=error)
    return SetSummary(
        metric=one["metric"],
        n=one["n"],
        chance=chance,
        control=None if control is None else control.mean.mean,
        score=score,
        loss=loss,
    )


def variant_json(variant: VariantSummary) -> dict[str, Any]:
    """Return the entry of ``comparison.json``: all fields except the curves of the runs."""
    plain = asdict(variant)
    for run in plain["runs"]:
        del run["curve"]
    return plain
