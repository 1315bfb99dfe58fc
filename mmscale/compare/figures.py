"""What came out: figures of each finished run, and of each variant over its seeds.

    RUN/result.json, metrics.jsonl --> RunFigures --over seeds--> VariantFigures --> comparison.json, the page

Everything here is read from run folders, so it can be made again at any time.
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

_LAST_SHARE = 10
"""The training loss of a run is that of the last tenth of its steps."""


@dataclass(frozen=True)
class Curve:
    """The training loss of a run over what it had cost so far; equally long."""

    learned_tokens: tuple[float, ...]
    flops: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """What depends on the machine: medians over the steps of a run.

    Attributes:
        step_seconds: Of a step.
        samples_per_second, learned_tokens_per_second, tokens_per_second: Over all ranks; ``tokens`` are all that the
            decoder has, those of images too.
        train_seconds: Of all steps together.
        memory_bytes: The most that a rank held: of its device, or of the process on a CPU.
    """

    step_seconds: float
    samples_per_second: float
    learned_tokens_per_second: float
    tokens_per_second: float
    train_seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class RunFigures:
    """One finished run.

    Attributes:
        tokens: All tokens of the decoder, those of images too.
        learned_tokens: Those that carried loss.
        flops: Of forward and backward, as they were done.
        train_loss: Mean over the learned tokens of the last tenth of the steps.
        heldout: ``result.json``'s, by set.
        curve: Not written into ``comparison.json``: ``metrics.jsonl`` has it.
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
    timing: Timing
    machine: str
    world_size: int
    precision: str
    curve: Curve = field(repr=False)


@dataclass(frozen=True)
class Figure:
    """A figure over the seeds of a variant.

    Attributes:
        mean: With its interval.
        difference: From the first variant, taken seed by seed; None for that itself.
        asked_error: Standard error over what was asked. Every seed is asked the same, so more seeds do not make it
            smaller. None for training.
    """

    mean: Interval
    difference: Interval | None
    asked_error: float | None = None


@dataclass(frozen=True)
class SetFigures:
    """A variant on one held-out set, over its seeds.

    Attributes:
        metric: The task in words.
        n: Questions or documents.
        chance: Share of right choices of a blind guess; None of documents.
        control: Mean score with the images exchanged among the samples; None where no images are asked about.
        score: Share of right choices; None of documents.
        loss: Of the right answers or the documents, nats a token; None of questions that bring their choices.
    """

    metric: str
    n: int
    chance: float | None
    control: float | None
    score: Figure | None
    loss: Figure | None


@dataclass(frozen=True)
class VariantFigures:
    """A variant over its finished seeds."""

    name: str
    overrides: tuple[str, ...]
    runs: tuple[RunFigures, ...]
    train_loss: Figure
    heldout: Mapping[str, SetFigures]

    def median(self, figure: Callable[[RunFigures], float]) -> float:
        """Of a figure over the runs."""
        return statistics.median(figure(run) for run in self.runs)


def read_variants(comparison: Comparison, trials: Sequence[Trial]) -> list[VariantFigures]:
    """All variants of which a run is finished, in order."""
    runs = [read_run(trial) for trial in trials if is_finished(trial.config)]
    own = {each.name: [run for run in runs if run.variant == each.name] for each in comparison.variants}
    first, confidence = own[comparison.variants[0].name], comparison.settings.confidence
    return [
        _variant(each.name, each.overrides, own[each.name], first, confidence)
        for each in comparison.variants
        if own[each.name]
    ]


def read_run(trial: Trial) -> RunFigures:
    """The figures of a finished run.

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


def _read_run(trial: Trial) -> RunFigures:
    folder = trial.config.run_dir
    result = read_result(folder)
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["learned_tokens"]]
    known = [record for record in records if finite(record["loss"]) is not None]
    last = known[-max(1, len(known) // _LAST_SHARE) :]
    weight = sum(record["learned_tokens"] for record in last)
    return RunFigures(
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


def _timing(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Timing:
    def rate(key: str) -> float:
        return statistics.median(record[key] / record["seconds"] for record in records)

    memory = result["memory"]
    return Timing(
        step_seconds=statistics.median(record["seconds"] for record in records),
        samples_per_second=rate("samples"),
        learned_tokens_per_second=rate("learned_tokens"),
        tokens_per_second=rate("tokens"),
        train_seconds=result["train_seconds"],
        memory_bytes=max(memory["device_bytes"] or memory["rss_bytes"]),
    )


def _curve(records: Sequence[Mapping[str, Any]]) -> Curve:
    points, learned, flops = [], 0, 0
    for record in records:
        learned += record["learned_tokens"]
        flops += record["model_flops"]
        if (loss := finite(record["loss"])) is not None:
            points.append((float(learned), float(flops), loss))
    return Curve(*zip(*points, strict=True)) if points else Curve((), (), ())


def _variant(
    name: str,
    overrides: tuple[str, ...],
    runs: Sequence[RunFigures],
    first: Sequence[RunFigures],
    confidence: float,
) -> VariantFigures:
    over_seeds = _OverSeeds(runs, {run.seed: run for run in first if run.variant != name}, confidence)
    heldout = {held: _held_out(over_seeds, held) for held in runs[0].heldout}
    return VariantFigures(name, overrides, tuple(runs), over_seeds.figure(lambda run: run.train_loss), heldout)


@dataclass(frozen=True)
class _OverSeeds:
    """Runs of a variant, and by seed those of the first one; none for that itself."""

    runs: Sequence[RunFigures]
    partner: Mapping[int, RunFigures]
    confidence: float

    def figure(self, of: Callable[[RunFigures], float]) -> Figure:
        pairs = [(run, self.partner[run.seed]) for run in self.runs if run.seed in self.partner]
        differences = [of(a) - of(b) for a, b in pairs]
        mean = mean_interval([of(run) for run in self.runs], self.confidence)
        return Figure(mean, mean_interval(differences, self.confidence) if differences else None)


def _held_out(over_seeds: _OverSeeds, held: str) -> SetFigures:
    one = over_seeds.runs[0].heldout[held]

    def figure(key: str) -> Figure | None:
        return None if one.get(key) is None else over_seeds.figure(lambda run: run.heldout[held][key])

    score, loss, control = figure("score"), figure("loss"), figure("control")
    if score is not None:
        score = replace(score, asked_error=binomial_error(score.mean.mean, one["n"]))
    elif loss is not None:
        loss = replace(loss, asked_error=statistics.fmean(run.heldout[held]["error"] for run in over_seeds.runs))
    return SetFigures(
        metric=one["metric"],
        n=one["n"],
        chance=one.get("chance"),
        control=None if control is None else control.mean.mean,
        score=score,
        loss=loss,
    )


def variant_json(figures: VariantFigures) -> dict[str, Any]:
    """As ``comparison.json`` has it: runs without their curves."""
    plain = asdict(figures)
    for run in plain["runs"]:
        del run["curve"]
    return plain
