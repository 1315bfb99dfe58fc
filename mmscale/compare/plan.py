"""Plan the steps of each run from the budget before training: replay the data order without decoding images.

    order of the data (a function of manifest, seed and lanes) --the loader's packer--> packs of each step
        --> learned tokens and operations of the step --until the budget is met--> steps of each stage

Every run therefore knows its number of steps from the start. Its learning rates decay over its own length, and it can
be stopped and resumed like any other run. (Ending a longer schedule early would leave the variant with the fewest steps
at learning rates that are too high.)

The order of the samples is the same for all variants. The number of samples per step is the same too if
``packing.max_documents`` limits every pack. If ``max_tokens`` limits packs, variants with more tokens per image have
smaller batches. ``Trial.parts_after`` reports from which step on batches differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import Any, NamedTuple

from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.history.replay import Replay
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import read_json
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate, join_nothing
from data_pipeline.packing.packer import Pack
from mmscale.compare.config import Comparison, EqualBudget, Variant
from mmscale.config import dump
from mmscale.errors import ConfigError, MMScaleError
from mmscale.models.config import ModelConfig, TokenizerConfig
from mmscale.models.flops import training_flops
from mmscale.optim.schedule import trained_components
from mmscale.optim.stages import StageConfig
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import teacher_models

PLAN_FILE = "plan.json"
_VERSION = "1"
"""Version of the measurement and of the file's format."""
_StepModel = tuple[ModelConfig | TokenizerConfig, Sequence[str]]
"""A model that a step runs, and its trained components (none for a teacher)."""


class StepLoad(NamedTuple):
    """Contents of one step, over all lanes.

    Attributes:
        samples: Number of documents without dummy documents.
        learned_tokens: Number of tokens with a loss.
        flops: Operations of forward and backward passes.
        batch: Hash of the positions of the samples, lane by lane. Compare it within one process only.
    """

    samples: int
    learned_tokens: int
    flops: int
    batch: int

    def amount(self, equal: EqualBudget) -> int:
        """Return the part of the budget that the step uses."""
        return self.learned_tokens if equal is EqualBudget.TOKENS else self.flops


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        steps: Number of steps.
        samples, learned_tokens, flops: Totals of the stage. Steps that were not measured count as the mean of the
            measured ones.
        measured_steps: Number of measured steps; these are the first ones.
    """

    steps: int
    samples: int
    learned_tokens: int
    flops: int
    measured_steps: int

    @classmethod
    def from_loads(cls, loads: Sequence[StepLoad], steps: int) -> StagePlan:
        """Return the plan of a stage of ``steps`` steps whose first ones are ``loads``."""
        samples, learned, flops = (round(sum(load[field] for load in loads) * steps / len(loads)) for field in range(3))
        return cls(steps, samples, learned, flops, len(loads))

    def amount(self, equal: EqualBudget) -> int:
        """Return the part of the budget that the stage uses."""
        return self.learned_tokens if equal is EqualBudget.TOKENS else self.flops


@dataclass(frozen=True)
class Trial:
    """One run of the comparison.

    Attributes:
        config: Config of this run, with its own folder, seed and steps.
        stages: Plan of each stage.
        parts_after: Number of measured steps before the first batch that differs from the first variant's; None if
            all measured batches contain the same samples.
    """

    variant: str
    seed: int
    config: RunConfig
    stages: tuple[StagePlan, ...]
    parts_after: int | None

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.variant}, seed {self.seed}"

    def summary(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        stages = zip(self.config.stages, self.stages, strict=True)
        return {
            "run_dir": str(self.config.run_dir),
            "parts_after": self.parts_after,
            "stages": {config.name: asdict(stage) for config, stage in stages},
        }


def plan_trials(comparison: Comparison, on_measured: Callable[[str], object] = lambda name: None) -> list[Trial]:
    """Plan all runs. They are ordered by seed: a partial comparison then has nearly the same seeds for all variants.

    The plan is cached in ``plan.json`` of the comparison's folder until configuration or data change.

    Args:
        comparison: The comparison.
        on_measured: Called with the name of each run after it was measured; not called for a cached plan.

    Raises:
        ConfigError: the data do not fit a variant or end before the budget; the message names the variant.
    """
    key = _key(comparison)
    path = comparison.run_dir / PLAN_FILE
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # Measure again.
        known = read_json(path)
        if known["key"] == key:
            return [_trial_from_record(comparison, record) for record in known["runs"]]
    trials: list[Trial] = []
    for seed in comparison.settings.seeds:
        first: _MeasuredVariant | None = None
        for variant in comparison.variants:
            own = _measure_variant(comparison, variant, seed, first)
            trials.append(_make_trial(comparison, variant, seed, own.stages, own.parts_after(first or own)))
            first = first or own
            on_measured(trials[-1].name)
    runs = [
        {"variant": t.variant, "seed": t.seed, "stages": [asdict(s) for s in t.stages], "parts_after": t.parts_after}
        for t in trials
    ]
    write_whole(path, json.dumps({"key": key, "runs": runs}, indent=2).encode() + b"\n", parents=True)
    return trials


def _key(comparison: Comparison) -> str:
    """Return a hash of everything that determines the plan, manifests and tokenizer included."""
    seed = comparison.settings.seeds[0]
    parts = [_VERSION, comparison.settings.model_dump_json()]
    for variant in comparison.variants:
        parts.append(dump(variant.run))
        try:
            for number in range(len(variant.run.stages)):
                data = variant.run.stage_data(number).model_copy(update={"workers": 0})
                loader = Loader(data, variant.run.stage_media(number), seed=seed)
                parts.append(str(loader.fingerprint))
                parts += [model.model_dump_json() for model in teacher_models(variant.run, number)]
                loader.close()
        except (MMScaleError, DataPipelineError) as error:
            raise ConfigError(f"variant {variant.name}: {error}") from error
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _trial_from_record(comparison: Comparison, record: dict[str, object]) -> Trial:
    (variant,) = (each for each in comparison.variants if each.name == record["variant"])
    stages = tuple(StagePlan(**stage) for stage in record["stages"])  # type: ignore[attr-defined]
    return _make_trial(comparison, variant, record["seed"], stages, record["parts_after"])  # type: ignore[arg-type]


def _make_trial(
    comparison: Comparison, variant: Variant, seed: int, stages: tuple[StagePlan, ...], parts_after: int | None
) -> Trial:
    config = variant.run.model_copy(
        update={
            "seed": seed,
            "run_dir": comparison.run_dir / variant.name / f"seed-{seed}",
            "stages": tuple(a.with_steps(b.steps) for a, b in zip(variant.run.stages, stages, strict=True)),
        }
    )
    return Trial(variant.name, seed, config, stages, parts_after)


@dataclass(frozen=True)
class _MeasuredVariant:
    """A variant's stages, and ``StepLoad.batch`` of each measured step."""

    stages: tuple[StagePlan, ...]
    batches: tuple[int, ...]

    def parts_after(self, first: _MeasuredVariant) -> int | None:
        pairs = list(zip(self.batches, first.batches, strict=False))
        num_equal = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return None if num_equal == len(pairs) else num_equal


def _measure_variant(
    comparison: Comparison, variant: Variant, seed: int, first: _MeasuredVariant | None
) -> _MeasuredVariant:
    config = variant.run.model_copy(update={"seed": seed})
    equal, most = comparison.settings.equal, comparison.settings.plan_steps
    plan, batches = list[StagePlan](), list[int]()
    try:
        for number, steps in enumerate(_stage_steps(config)):
            if first is None:
                planned = config.stages[number].steps
                loads = list(islice(steps, min(planned, most)))
            else:
                budget = first.stages[number].amount(equal)
                loads = list(_until_budget(steps, budget, equal, most))
                planned = max(len(loads), math.ceil(budget * len(loads) / sum(load.amount(equal) for load in loads)))
            plan.append(StagePlan.from_loads(loads, planned))
            batches += [load.batch for load in loads]
    except (MMScaleError, DataPipelineError) as error:
        raise ConfigError(f"variant {variant.name}, seed {seed}: {error}") from error
    return _MeasuredVariant(tuple(plan), tuple(batches))


def _until_budget(steps: Iterator[StepLoad], budget: int, equal: EqualBudget, most: int) -> Iterator[StepLoad]:
    """Yield steps until their sum reaches the budget, at most ``most`` steps."""
    spent = 0
    for load in islice(steps, most):
        yield load
        spent += load.amount(equal)
        if spent >= budget:
            return


def _stage_steps(config: RunConfig) -> Iterator[Iterator[StepLoad]]:
    """Yield, for each stage, an endless iterator over its steps. Consume the iterators in order.

    A stage that continues the previous stage's data starts where the caller stopped reading that iterator.
    """
    replay: Replay | None = None
    for number, stage in enumerate(config.stages):
        spec = config.stage_media(number)
        if replay is None or not config.continues(number):
            replay = Replay(config.stage_data(number), spec, config.seed, give_up=True)
        model = config.stage_model(number)
        learning = (model, trained_components(model.components, stage))
        yield _steps(replay, [learning, *((each, ()) for each in teacher_models(config, number))], spec, stage)


def _steps(replay: Replay, models: Sequence[_StepModel], spec: MediaSpec, stage: StageConfig) -> Iterator[StepLoad]:
    while True:
        load = _measure_step(replay.next_packs(), models, spec)
        if not load.samples:
            raise DataConfigError(
                f"stage {stage.name}: every data set gave all its epochs after {replay.step - 1} steps "
                "(data.datasets.*.max_epochs), before the budget was met"
            )
        if not load.learned_tokens:
            raise DataConfigError(f"stage {stage.name}: step {replay.step} would learn nothing: no token carries loss")
        yield load


def _measure_step(packs: dict[int, Pack], models: Sequence[_StepModel], spec: MediaSpec) -> StepLoad:
    """Measure one step lane by lane. All counts are sums over documents and spans, so microbatches do not matter."""
    learned = flops = 0
    for pack in packs.values():
        batch = collate([pack], spec, join_nothing)
        learned += int(batch.loss_weights.count_nonzero())
        flops += sum(training_flops(model, batch, trained).model for model, trained in models)
    positions = tuple((lane, pack.drawn) for lane, pack in packs.items())
    return StepLoad(sum(len(pack.drawn) for pack in packs.values()), learned, flops, hash(positions))
