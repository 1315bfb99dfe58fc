"""From a budget to steps, before anything is trained: what each run will be fed is measured, without a pixel.

    order of the data (a function of manifest, seed and lanes) --the loader's packer--> packs of each step
        --> learned tokens and operations of the step --until the budget is met--> steps of each stage

So each run of a comparison is an ordinary run that knows its last step from its first: its learning rates fall over
its own length, and it can be stopped and go on like any other. (Ending a longer schedule early would hold the variant
with the fewest steps to rates that are too high.)

The order of the samples is the same for all variants. How many of them a step holds is the same too as long as
``packing.max_documents`` closes every pack; where ``max_tokens`` does, variants whose images take more tokens have
smaller batches. Which of the two it is, is found out here and told.
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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.errors import DataConfigError, DataPipelineError
from data_pipeline.history.replay import Replay
from data_pipeline.io.atomic import write_whole
from data_pipeline.io.untrusted import read_json
from data_pipeline.loader.loader import Loader
from data_pipeline.media_spec import MediaSpec
from data_pipeline.packing.collate import collate
from data_pipeline.packing.packer import Pack
from mmscale.compare.config import Comparison, Equal, Variant
from mmscale.config import dump
from mmscale.errors import ConfigError, MMScaleError
from mmscale.models.config import ModelConfig
from mmscale.models.flops import training_flops
from mmscale.optim.schedule import trained_components
from mmscale.optim.stages import StageConfig
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import teacher_models

PLAN_FILE = "plan.json"
_VERSION = "1"
"""Of what is measured, and of the file."""
_Computed = tuple[ModelConfig, Sequence[str]]
"""A model that a step runs, and what of it learns: nothing of a teacher."""


class StepLoad(NamedTuple):
    """What one step holds, over all lanes.

    Attributes:
        samples: Documents, null documents left out.
        learned_tokens: Tokens that carry loss.
        flops: Of forward and backward.
        batch: Hash of the places of the samples, lane by lane.
    """

    samples: int
    learned_tokens: int
    flops: int
    batch: int

    def amount(self, equal: Equal) -> int:
        """As much of the budget as the step takes."""
        return self.learned_tokens if equal is Equal.TOKENS else self.flops


@dataclass(frozen=True)
class StagePlan:
    """A stage as it is to be.

    Attributes:
        steps: Its steps.
        samples, learned_tokens, flops: Of all of them; behind the steps that were measured as many a step as in these.
        measured_steps: Steps that were measured, the first ones.
    """

    steps: int
    samples: int
    learned_tokens: int
    flops: int
    measured_steps: int

    @classmethod
    def of(cls, loads: Sequence[StepLoad], steps: int) -> StagePlan:
        """The plan of ``steps`` steps that begin with ``loads``."""
        samples, learned, flops = (round(sum(load[field] for load in loads) * steps / len(loads)) for field in range(3))
        return cls(steps, samples, learned, flops, len(loads))

    def amount(self, equal: Equal) -> int:
        """As much of the budget as the stage takes."""
        return self.learned_tokens if equal is Equal.TOKENS else self.flops


@dataclass(frozen=True)
class Trial:
    """One run of the comparison.

    Attributes:
        config: The whole run: folder, seed and steps are its own.
        stages: What it will be fed.
        parts_after: Measured steps after which its batches part from those of the first variant; None if each step
            holds the same samples.
    """

    variant: str
    seed: int
    config: RunConfig
    stages: tuple[StagePlan, ...]
    parts_after: int | None

    @property
    def name(self) -> str:
        """As in messages."""
        return f"{self.variant}, seed {self.seed}"

    def summary(self) -> dict[str, Any]:
        """The plan in figures."""
        stages = zip(self.config.stages, self.stages, strict=True)
        return {
            "run_dir": str(self.config.run_dir),
            "parts_after": self.parts_after,
            "stages": {config.name: asdict(stage) for config, stage in stages},
        }


def plan_trials(comparison: Comparison, measured: Callable[[str], object] = lambda name: None) -> list[Trial]:
    """All runs, seed by seed, so that whatever is done at any time compares like with like.

    The plan is kept in the comparison's folder, so a second call measures nothing while configuration and data stay.

    Args:
        comparison: What is compared.
        measured: Told of each run that was measured.

    Raises:
        ConfigError: the data cannot serve a variant; the message has its name.
    """
    key = _key(comparison)
    path = comparison.run_dir / PLAN_FILE
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # Else it is made again.
        known = read_json(path)
        if known["key"] == key:
            return [_recalled(comparison, record) for record in known["runs"]]
    trials: list[Trial] = []
    for seed in comparison.settings.seeds:
        first: _Measured | None = None
        for variant in comparison.variants:
            own = _measure(comparison, variant, seed, first)
            trials.append(_trial(comparison, variant, seed, own.stages, own.parts_after(first or own)))
            first = first or own
            measured(trials[-1].name)
    runs = [
        {"variant": t.variant, "seed": t.seed, "stages": [asdict(s) for s in t.stages], "parts_after": t.parts_after}
        for t in trials
    ]
    write_whole(path, json.dumps({"key": key, "runs": runs}, indent=2).encode() + b"\n", parents=True)
    return trials


def _key(comparison: Comparison) -> str:
    """Hash of everything that a plan follows from, the manifests and the tokenizer too."""
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


def _recalled(comparison: Comparison, record: dict[str, object]) -> Trial:
    (variant,) = (each for each in comparison.variants if each.name == record["variant"])
    stages = tuple(StagePlan(**stage) for stage in record["stages"])  # type: ignore[attr-defined]
    return _trial(comparison, variant, record["seed"], stages, record["parts_after"])  # type: ignore[arg-type]


def _trial(
    comparison: Comparison, variant: Variant, seed: int, stages: tuple[StagePlan, ...], parts_after: int | None
) -> Trial:
    config = variant.run.model_copy(
        update={
            "seed": seed,
            "run_dir": comparison.run_dir / variant.name / f"seed-{seed}",
            "stages": tuple(a.stretched(b.steps) for a, b in zip(variant.run.stages, stages, strict=True)),
        }
    )
    return Trial(variant.name, seed, config, stages, parts_after)


@dataclass(frozen=True)
class _Measured:
    """A variant's stages, and the batches of the steps that were measured."""

    stages: tuple[StagePlan, ...]
    batches: tuple[int, ...]

    def parts_after(self, first: _Measured) -> int | None:
        pairs = list(zip(self.batches, first.batches, strict=False))
        alike = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return None if alike == len(pairs) else alike


def _measure(comparison: Comparison, variant: Variant, seed: int, first: _Measured | None) -> _Measured:
    config = variant.run.model_copy(update={"seed": seed})
    equal, most = comparison.settings.equal, comparison.settings.plan_steps
    plan, batches = list[StagePlan](), list[int]()
    try:
        for number, steps in enumerate(_stages(config)):
            if first is None:
                planned = config.stages[number].steps
                loads = list(islice(steps, min(planned, most)))
            else:
                budget = first.stages[number].amount(equal)
                loads = list(_until(steps, budget, equal, most))
                planned = max(len(loads), math.ceil(budget * len(loads) / sum(load.amount(equal) for load in loads)))
            plan.append(StagePlan.of(loads, planned))
            batches += [load.batch for load in loads]
    except (MMScaleError, DataPipelineError) as error:
        raise ConfigError(f"variant {variant.name}, seed {seed}: {error}") from error
    return _Measured(tuple(plan), tuple(batches))


def _until(steps: Iterator[StepLoad], budget: int, equal: Equal, most: int) -> Iterator[StepLoad]:
    """The steps up to the first with which the budget is met, ``most`` of them at most."""
    spent = 0
    for load in islice(steps, most):
        yield load
        spent += load.amount(equal)
        if spent >= budget:
            return


def _stages(config: RunConfig) -> Iterator[Iterator[StepLoad]]:
    """Of each stage its endless steps; a stage that goes on with the data of the one before begins where that ended."""
    replay: Replay | None = None
    for number, stage in enumerate(config.stages):
        spec = config.stage_media(number)
        if replay is None or not config.continues(number):
            replay = Replay(config.stage_data(number), spec, config.seed, give_up=True)
        model = config.stage_model(number)
        learning = (model, trained_components(model.components, stage))
        yield _steps(replay, [learning, *((each, ()) for each in teacher_models(config, number))], spec, stage)


def _steps(replay: Replay, models: Sequence[_Computed], spec: MediaSpec, stage: StageConfig) -> Iterator[StepLoad]:
    while True:
        load = _measured(replay.next_packs(), models, spec)
        if not load.samples:
            raise DataConfigError(
                f"stage {stage.name}: every data set gave all its epochs after {replay.step - 1} steps "
                "(data.datasets.*.max_epochs), before the budget was met"
            )
        if not load.learned_tokens:
            raise DataConfigError(f"stage {stage.name}: step {replay.step} would learn nothing: no token carries loss")
        yield load


def _measured(packs: dict[int, Pack], models: Sequence[_Computed], spec: MediaSpec) -> StepLoad:
    """Lane by lane: whatever is counted here is a sum over documents and spans, which microbatches do not change."""
    learned = flops = 0
    for pack in packs.values():
        batch = collate([pack], spec, _without_pixels)
        learned += int(batch.loss_weights.count_nonzero())
        flops += sum(training_flops(model, batch, trained).model for model, trained in models)
    places = tuple((lane, pack.drawn) for lane, pack in packs.items())
    return StepLoad(sum(len(pack.drawn) for pack in packs.values()), learned, flops, hash(places))


def _without_pixels(arrays: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    return torch.empty((0, arrays[0].shape[1]), dtype=torch.uint8)
