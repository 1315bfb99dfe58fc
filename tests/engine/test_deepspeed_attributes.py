"""A DeepSpeed without an attribute that mmscale reads is refused at the start. Other tests start real engines."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mmscale.dist import World
from mmscale.engine import deepspeed_attributes
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.deepspeed_attributes import KNOWN_VERSIONS, check_attributes
from mmscale.engine.engine import Engine
from mmscale.errors import UnsupportedError
from tests.engine.programs import stage
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyModel, ToyObjective, initialise_
from tests.test_dependencies import pyproject

STAGES = {
    "stage 3": (3, deepspeed_attributes._STAGE_3, deepspeed_attributes._STAGE_3_PARAMETER),
    "stage 2": (2, deepspeed_attributes._STAGE_1_2, ("_hp_mapping",)),
    "stage 1, bf16": (1, deepspeed_attributes._STAGE_1_BF16, ("_hp_mapping",)),
    "stage 0": (0, deepspeed_attributes._STAGE_0_WRAPPER, ()),
}


def stand_in(wrapper: tuple[str, ...], of_parameter: tuple[str, ...], *, absent: str = "") -> tuple[Any, nn.Module]:
    """An engine and a model with every attribute, except one."""

    def owner(name: str, attributes: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(**{each: object() for each in attributes if f"{name}.{each}" != absent})

    engine = owner("engine", deepspeed_attributes._ENGINE)
    engine.optimizer = owner("optimizer", wrapper)
    engine.optimizer.loss_scaler = owner("loss_scaler", ("dynamic", *deepspeed_attributes._LOSS_SCALER))
    model = nn.Linear(2, 2)
    for each in of_parameter:
        if f"parameter.{each}" != absent:
            setattr(model.weight, each, object())
    return engine, model


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_attribute_is_named_with_the_versions_that_work(name: str) -> None:
    stage, wrapper, of_parameter = STAGES[name]
    check_attributes(*stand_in(wrapper, of_parameter), stage, "0.19.4")
    # Without the attribute that tells the wrapper class, the wrapper is taken for the other class.
    listed = [f"optimizer.{each}" for each in wrapper if each != "bf16_groups"]
    listed += [f"parameter.{each}" for each in of_parameter] + ["engine.was_step_applied", "loss_scaler.cur_iter"]
    for absent in listed:
        with pytest.raises(UnsupportedError, match=rf"DeepSpeed 0\.20\.0 lacks .*: {re.escape(absent)}\. ") as error:
            check_attributes(*stand_in(wrapper, of_parameter, absent=absent), stage, "0.20.0")
        assert f"DeepSpeed {KNOWN_VERSIONS} is known to work" in str(error.value)


def test_the_versions_are_those_of_pyproject() -> None:
    floor, ceiling = re.search(r'"deepspeed>=([\d.]+),<([\d.]+)"', pyproject()).groups()
    assert KNOWN_VERSIONS.split(" to ")[0] == floor
    assert ceiling == "0.20"


def start_without_an_attribute(world: World) -> str:
    """Runs in a process of its own."""
    config = EngineConfig.model_validate({"precision": "fp32", "device": "cpu", "zero_stage": 2})
    deepspeed_attributes._STAGE_1_2 = ("renamed",)
    try:
        Engine(construct(ToyModel, config, world, initialise_), ToyObjective(), stage(), config, world)
    except UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_starting_engine_is_checked() -> None:
    (message,) = run_ranks("tests.engine.test_deepspeed_attributes:start_without_an_attribute", 1)
    assert "lacks what mmscale reads at ZeRO stage 2: optimizer.renamed. DeepSpeed" in message
