"""Functions that the ranks of ``test_moe_bias.py`` run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.nn.init import initialise_
from mmscale.nn.moe import Router
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, pack, text_document
from tests.models.tiny import MOE, VOCAB, config

LANES, STEPS, REFUSED = 4, 4, 2


def balance(world: World, engine_values: dict[str, Any], train: list[str]) -> dict[str, Any]:
    """Return the loads of each step by expert, counted by hooks, and each router's biases after the step."""
    settings = config("embedding", mlp={**MOE, "bias_rate": 0.02})
    engine_config = EngineConfig.model_validate({"device": "cpu", "precision": "bf16", **engine_values})
    model = construct(partial(build_model, settings, seed=None), engine_config, world, partial(initialise_, seed=3))
    stage = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-2}, "train": train}
    engine = Engine(model, NextToken(), StageConfig.model_validate(stage), engine_config, world)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = torch.zeros(len(routers), MOE["num_experts"])

    def count(number: int, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        for row in outputs[1][inputs[1]].tolist():
            for expert in row:
                loads[number, expert] += 1

    for number, router in enumerate(routers):
        router.register_forward_hook(lambda module, inputs, outputs, number=number: count(number, inputs, outputs))
    spec = media_spec(settings)
    answer: dict[str, Any] = {"loads": [], "bias": []}
    for step in range(STEPS):
        loads.zero_()
        packs = []
        for lane in range(world.rank, LANES, world.world_size):
            seed = 7 * step + lane
            image = image_document(spec, seed, 6, [(2, 2)], VOCAB, dummy=lane % 2 == 0)
            packs.append(pack([text_document(seed, 5 + lane, VOCAB), image], spec))
        engine.train_step(packs, None if step != REFUSED else lambda loss, norm: True)
        answer["loads"].append(loads.tolist())
        answer["bias"].append([router.bias_steps.tolist() for router in routers])
    engine.close()
    return answer
