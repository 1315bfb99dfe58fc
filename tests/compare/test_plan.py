"""Planned steps equal those counted from the loader's real batches until the budget is met."""

from __future__ import annotations

import json
import math
from itertools import islice

import pytest

from data_pipeline.loader.loader import Loader
from mmscale.compare import Comparison, Trial, plan_trials
from mmscale.compare import plan as plan_module
from mmscale.errors import ConfigError
from mmscale.models.flops import training_flops
from mmscale.optim.schedule import trained_components
from mmscale.run.config import RunConfig
from tests.compare.conftest import Read

Counted = tuple[int, int, int, dict[int, object]]
"""Samples, learned tokens, operations and positions of the samples of one step."""


def counted(config: RunConfig, seed: int, number: int, steps: int, skip: int = 0) -> list[Counted]:
    """Count the first steps of a stage from the batches of training."""
    model, data = config.stage_model(number), config.stage_data(number)
    trained = trained_components(model.components, config.stages[number])
    found: list[Counted] = []
    loader = Loader(data, config.stage_media(number), seed=seed, micro_lanes=2)
    for batch in islice(loader, skip, skip + steps):
        learned = sum(int((part.loss_weights > 0).sum()) for part in batch.microbatches)
        flops = sum(training_flops(model, part, trained).model for part in batch.microbatches)
        found.append((batch.num_samples, learned, flops, dict(batch.drawn)))
    loader.close()
    return found


def by_variant(trials: list[Trial], seed: int) -> dict[str, Trial]:
    return {trial.variant: trial for trial in trials if trial.seed == seed}


def run_of(comparison: Comparison, name: str) -> RunConfig:
    return next(variant.run for variant in comparison.variants if variant.name == name)


@pytest.mark.parametrize("equal", ["tokens", "flops"])
@pytest.mark.parametrize("packing", ["{max_tokens: 1024, max_documents: 4}", "{max_tokens: 64, look_ahead: 3}"])
def test_a_variant_stops_at_the_step_that_meets_the_budget(read: Read, equal: str, packing: str) -> None:
    comparison = read(f"compare.equal={equal}", "compare.seeds=[3]", f"data.packing={packing}")
    trials = by_variant(plan_trials(comparison), 3)
    which = 1 if equal == "tokens" else 2
    first = counted(run_of(comparison, "embedding"), 3, 0, 6)
    budget = sum(step[which] for step in first)
    steps = {}
    for name, trial in trials.items():
        real = counted(run_of(comparison, name), 3, 0, 16)
        enough = next(n for n in range(1, 17) if sum(step[which] for step in real[:n]) >= budget)
        (stage,) = trial.stages
        sums = [sum(step[k] for step in real[:enough]) for k in range(3)]
        assert [stage.steps, stage.samples, stage.learned_tokens, stage.flops] == [enough, *sums]
        assert trial.config.stages[0].steps == enough
        shared = list(zip(first, real[:enough], strict=False))
        parted = [number for number, (a, b) in enumerate(shared) if a[3] != b[3]]
        assert trial.parts_after == (parted[0] if parted else None)
        steps[name] = enough
    if equal == "tokens" and "1024" in packing:
        assert set(steps.values()) == {6}, "the same batches hold the same tokens"
    else:
        assert len(set(steps.values())) > 1, "the budget must bind somewhere, or nothing was tested"


def test_a_stage_continues_the_data_of_the_previous_stage(read: Read) -> None:
    stages = "stages=[{name: align, steps: 2, train: [vision, connector]}, {name: all, steps: 3}]"
    comparison = read("compare.equal=flops", stages, "data.datasets.0.template.answers=['{name}, {group}']")
    trials = by_variant(plan_trials(comparison), 1)
    run = run_of(comparison, "cross")
    done = 0
    for number, steps in enumerate((2, 3)):
        budget = trials["embedding"].stages[number].flops
        assert trials["embedding"].stages[number].steps == steps
        real = counted(run, 1, number, 10, skip=done)
        enough = next(n for n in range(1, 11) if sum(step[2] for step in real[:n]) >= budget)
        stage = trials["cross"].stages[number]
        sums = [sum(step[k] for step in real[:enough]) for k in range(3)]
        assert [stage.steps, stage.samples, stage.learned_tokens, stage.flops] == [enough, *sums]
        done += enough


def test_the_schedule_is_stretched_over_the_steps(read: Read) -> None:
    trials = by_variant(plan_trials(read("compare.equal=flops")), 1)
    cross = trials["cross"].config.stages[0]
    assert cross.steps > 6
    assert cross.warmup_steps == math.ceil(2 * cross.steps / 6)


def test_steps_that_are_not_measured_hold_as_much_as_those_that_are(read: Read) -> None:
    exact = by_variant(plan_trials(read("compare.equal=flops", "stages.0.steps=20")), 1)
    words = ("compare.equal=flops", "stages.0.steps=20", "compare.plan_steps=8")
    rough = by_variant(plan_trials(read(*words)), 1)
    for name, trial in rough.items():
        stage = trial.stages[0]
        assert stage.measured_steps == 8
        assert stage.steps == pytest.approx(exact[name].stages[0].steps, abs=2)
        assert stage.flops == pytest.approx(exact[name].stages[0].flops, rel=0.1)
    assert rough["embedding"].stages[0].steps == 20


def test_each_seed_has_an_order_of_its_own_which_all_variants_share(read: Read) -> None:
    trials = plan_trials(read("compare.seeds=[1, 2]"))
    assert [(t.seed, t.variant) for t in trials[:4]] == [
        (1, "embedding"),
        (1, "cross"),
        (1, "hybrid"),
        (2, "embedding"),
    ]
    assert all(trial.parts_after is None for trial in trials)
    tokens = {(t.seed, t.stages[0].learned_tokens) for t in trials}
    assert len(tokens) == 2
    assert [t.config.seed for t in trials] == [1, 1, 1, 2, 2, 2]


def test_a_plan_is_kept_and_forgotten_when_anything_changes(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    plan = plan_trials(read(), measured.append)
    assert len(measured) == 3
    assert plan_trials(read(), measured.append) == plan
    assert len(measured) == 3
    assert plan_trials(read("data.packing.max_documents=3"), measured.append) != plan
    assert len(measured) == 6


def test_a_plan_is_forgotten_when_the_data_change(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = read()
    plan_trials(comparison)
    key = json.loads((comparison.run_dir / plan_module.PLAN_FILE).read_text())["key"]
    manifest = "data.datasets.0.manifest=examples/emoji/shards/heldout-concept.manifest"
    plan_trials(read(manifest))
    assert json.loads((comparison.run_dir / plan_module.PLAN_FILE).read_text())["key"] != key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.datasets.0.max_epochs=1", "stages.0.steps=30"], r"variant embedding, seed 1: .*gave all its epochs"),
        (
            ["compare.equal=flops", "data.datasets.0.max_epochs=1", "stages.0.steps=17"],
            r"variant cross, seed 1: .*gave",
        ),
        (
            ["compare.variants.2.overrides=[\"data.datasets.0.template.answers=['{gone}']\"]"],
            r"variant hybrid, seed 1: .*gone",
        ),
        (
            ["compare.variants.2.overrides=[data.packing.max_tokens=2]"],
            r"variant hybrid, seed 1: .*a pack holds 2 tokens",
        ),
    ],
)
def test_data_that_do_not_fit_a_variant_are_reported_with_its_name(read: Read, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_trials(read(*words))
