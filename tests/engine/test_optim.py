"""Schedules, groups and the clipped optimizer against formulas and plain torch."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from mmscale.engine.optimizers.build import ClippedAdamW
from mmscale.errors import ConfigError
from mmscale.optim.config import AdamWConfig
from mmscale.optim.schedule import (
    LearningRates,
    component_of_parameters,
    decays,
    freeze,
    parameter_groups,
    schedule,
)
from mmscale.optim.stages import StageConfig
from tests.engine.toy import ToyModel, toy_model

COSINE = StageConfig(name="s", steps=110, warmup_steps=10, min_learning_rate=0.1, learning_rate={"default": 2.0})


def test_cosine_rises_linearly_and_falls_to_its_share() -> None:
    assert [schedule(COSINE, step, 10) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(COSINE, 59, 10) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(COSINE, 109, 10) == pytest.approx(0.1)


def test_linear_and_constant() -> None:
    linear = COSINE.model_copy(update={"schedule": "linear"})
    constant = COSINE.model_copy(update={"schedule": "constant"})
    assert schedule(linear, 34, 10) == pytest.approx(0.1 + 0.9 * 0.75)
    assert {schedule(constant, step, 10) for step in range(9, 200)} == {1.0}


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    floor=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear"]),
)
def test_a_schedule_never_leaves_its_bounds_and_never_rises_after_warmup(
    steps: int, warmup: int, floor: float, kind: str
) -> None:
    warmup = min(warmup, steps)
    stage = StageConfig.model_validate(
        {"name": "s", "steps": steps, "warmup_steps": warmup, "min_learning_rate": floor, "schedule": kind}
    )
    shares = [schedule(stage, step, warmup) for step in range(steps + 3)]
    assert all(0 <= share <= 1 + 1e-12 for share in shares)
    after = shares[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    if warmup < steps:
        assert shares[steps - 1] == pytest.approx(floor)


def test_learning_rates_by_component() -> None:
    stage = COSINE.model_copy(update={"learning_rate": {"default": 1.0, "vision": 0.5}})
    assert LearningRates(stage, ("vision", "decoder")).at(4) == pytest.approx({"vision": 0.25, "decoder": 0.5})


def test_each_component_warms_up_by_itself() -> None:
    warmups = {"warmup_steps": {"vision": 60, "connector": 0, "default": 10}}
    stage = COSINE.model_copy(update=warmups)
    assert {name: stage.warmup(name) for name in ("vision", "connector", "decoder")} == {
        "vision": 60,
        "connector": 0,
        "decoder": 10,
    }
    whole = {name: COSINE.model_copy(update={"warmup_steps": stage.warmup(name)}) for name in ("vision", "decoder")}
    for step in (0, 9, 10, 30, 59, 60, 109):
        rates = LearningRates(stage, ("vision", "connector", "decoder")).at(step)
        assert {name: rates[name] for name in whole} == pytest.approx(
            {name: LearningRates(each, (name,)).at(step)[name] for name, each in whole.items()}
        )
    assert LearningRates(stage, ("connector",)).at(0)["connector"] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"warmup_steps": 200}, "longer than the stage"),
        ({"warmup_steps": {"default": 2, "vision": 200}}, "longer than the stage"),
        ({"train": ["vision"], "warmup_steps": {"decoder": 2, "default": 1}}, "warmup_steps names"),
        ({"train": ["vision", "decoder"], "warmup_steps": {"vision": 2}}, "warmup_steps has no value for"),
        ({"train": ["vision", "vision"]}, "twice"),
        ({"train": ["all", "vision"]}, "must be the only name"),
        ({"train": ["vision"], "learning_rate": {"decoder": 1e-3}}, "does not train"),
        ({"train": ["vision", "decoder"], "learning_rate": {"vision": 1e-3}}, "no value for"),
        ({"learning_rate": {"default": 0.0}}, "greater than 0"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_impossible_stages_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StageConfig.model_validate({"name": "s", "steps": 110} | change)


def test_only_matrices_decay() -> None:
    assert decays("decoder.mlp.gate_proj.weight", (4, 8))
    assert decays("experts.down_proj", (3, 4, 8))
    assert not decays("norm.weight", (8,))
    assert not decays("experts.up_bias", (3, 8))
    assert not decays("connector.gate", (1, 1))


def test_groups_hold_every_trained_parameter_once_under_its_name() -> None:
    model = toy_model()
    stage = StageConfig(name="s", steps=1, train=("connector", "decoder"), optimizer=AdamWConfig(weight_decay=0.3))
    freeze(model, model.components(), stage)
    groups = parameter_groups(model, model.components(), stage)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found["connector/no_decay"] == {"connector.project.bias", "connector.gate"}
    assert found["connector/decay"] == {"connector.project.weight"}
    assert "decoder.blocks.0.up.weight" in found["decoder/decay"]
    assert {group["name"]: group["weight_decay"] for group in groups}["decoder/decay"] == 0.3
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(name for members in found.values() for name in members) == sorted(trained)
    assert not any(name.startswith("vision") for name in trained)


def test_a_component_that_the_model_lacks_is_named() -> None:
    model = toy_model()
    with pytest.raises(ConfigError, match=r"no component \['audio'\]"):
        freeze(model, model.components(), StageConfig(name="s", steps=1, train=("audio",)))


def test_every_parameter_has_one_component() -> None:
    model = ToyModel()
    parts = model.components()
    with pytest.raises(ConfigError, match="no component"):
        component_of_parameters(model, {name: parts[name] for name in ("vision", "decoder", "embedding")})
    with pytest.raises(ConfigError, match="belongs to the components"):
        component_of_parameters(model, parts | {"again": [model.vision.weight]})


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_clipped_adamw_equals_torch(clip: float) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    theirs = copy.deepcopy(ours)
    mine = ClippedAdamW(ours.parameters(), betas=(0.9, 0.95), eps=1e-8)
    mine.clip = clip
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    mine.param_groups[0]["lr"] = 0.01
    for _ in range(5):
        inputs = torch.randn(11, 5)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        reference.step()
        mine.step()
        assert mine._global_grad_norm == pytest.approx(float(norm), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_clipped_adamw_refuses_gradients_that_are_not_finite() -> None:
    model = nn.Linear(2, 2)
    optimizer = ClippedAdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8)
    optimizer.param_groups[0]["lr"] = 0.1
    before = copy.deepcopy(model.state_dict())
    model(torch.full((1, 2), math.inf)).sum().backward()
    optimizer.step()
    assert optimizer.overflow
    assert not optimizer.state
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
