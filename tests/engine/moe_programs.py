"""Functions that the ranks of ``test_moe_bias.py`` and ``test_moe_balance.py`` run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.media_spec import MediaSpec
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.init import initialise_
from mmscale.nn.router import Router, routers
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.models.packs import Doc, image_document, pack, text_document
from tests.models.tiny import MOE, VOCAB, config

LANES, STEPS, REFUSED = 4, 4, 2


def balance(world: World, engine_values: dict[str, Any], train: list[str]) -> dict[str, Any]:
    """Return the loads of each step by expert, counted by hooks, and each router's biases after the step."""
    settings = config("embedding", mlp={**MOE, "bias_rate": 0.02})
    engine_config = EngineConfig.model_validate({"device": "cpu", "precision": "bf16", **engine_values})
    model = construct(partial(build_model, settings, seed=None), engine_config, world, partial(initialise_, seed=3))
    stage = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-2}, "train": train}
    objective = NextToken(world=world)
    engine = Engine(model, objective, StageConfig.model_validate(stage), engine_config, world)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    loads = torch.zeros(len(routers), MOE["num_experts"])

    def count(number: int, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        for row in outputs[1][inputs[1].valid].tolist():
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


DOCUMENTS, SCOPES, MICROBATCHES = 12, ("global", "sequence"), (1, 2, 4)


def scoped_model(scope: str) -> ModelConfig:
    """Return a model with experts in a balance scope, with large weights of both losses."""
    return config(
        "embedding", mlp={**MOE, "balance": scope, "balance_coefficient": 0.5, "z_coefficient": 0.02, "bias_rate": 0.1}
    )


def sharpen_(model: nn.Module) -> None:
    """Give the routers weights like those of trained ones: far from equal probabilities."""
    with torch.no_grad():
        for router in routers(model):
            router.weight *= 0.5 / router.weight.std()


def documents(spec: MediaSpec) -> list[Doc]:
    """Return documents of very different lengths, every third with an image."""
    found = []
    for seed in range(DOCUMENTS):
        words = 3 + (7 * seed) % 19
        plain = text_document(seed, words, VOCAB)
        found.append(plain if seed % 3 else image_document(spec, seed, words, [(2, 2)], VOCAB))
    return found


def _read_gradients(model: nn.Module, found: dict[str, Any], loss: float, norm: float) -> str:
    """Store the gradients in ``found``. Return a reason to reject the update, so that all cases have equal weights."""
    del loss, norm
    found["gradients"] = {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}
    return "compare"


def gradients(world: World) -> dict[str, Any]:
    """Return loss, gradients and router sums of the same documents in 1, 2 and 4 microbatches, by balance scope.

    Also return the ``refusal`` of an objective that does not know the other ranks.
    """
    answer: dict[str, Any] = {"refusal": refusal()}
    for scope in SCOPES:
        settings = scoped_model(scope)
        spec = media_spec(settings)
        engine_config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", "zero_stage": 0})
        model = build_model(settings, seed=3)
        sharpen_(model)
        stage = StageConfig.model_validate({"name": "all", "steps": 9, "learning_rate": {"default": 1e-2}})
        engine = Engine(model, NextToken(world=world), stage, engine_config, world)
        answer[scope] = []
        for number in MICROBATCHES:
            slots = world.world_size * number
            first = world.rank * number
            docs = [documents(spec)[slot::slots] for slot in range(first, first + number)]
            dummy = image_document(spec, 0, 4, [(2, 2)], VOCAB, dummy=True)
            found: dict[str, Any] = {}

            read = partial(_read_gradients, model, found)
            report = engine.train_step([pack([*each, dummy], spec) for each in docs], read)
            found |= {"loss": report.loss, **report.metrics, "load": report.router.load.tolist()}
            found["entropy"] = report.router.entropy.tolist()
            answer[scope].append(found)
        engine.close()
    return answer


def refusal() -> str:
    """Return the error of an objective that was built without the world; empty if there is none."""
    settings = scoped_model("global")
    batch = pack(documents(media_spec(settings)), media_spec(settings))
    try:
        NextToken()(build_model(settings, seed=3), batch)
    except ValueError as error:
        return str(error)
    return ""
