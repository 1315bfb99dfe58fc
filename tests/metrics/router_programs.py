"""Functions that the ranks of ``test_router_log.py`` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.engine import Engine
from mmscale.metrics.router_log import RouterLog
from mmscale.models.build import build_model, media_spec
from mmscale.nn.router import routers
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.engine.moe_programs import sharpen_
from tests.models.packs import IMAGE_ID, Doc, image_document, pack, text_document
from tests.models.tiny import DENSE, MOE, VOCAB, config

EVERY, STEPS, EXPERTS = 2, 4, MOE["num_experts"]


def _kinds(documents: list[Doc]) -> list[int | None]:
    """Return 0 for a row of text, 1 for a row of an image, and None for a row that does not count."""
    return [None if doc.dummy else int(token == IMAGE_ID) for doc in documents for token in doc.tokens]


def windows(world: World, folder: str) -> dict[str, Any]:
    """Train with a ``RouterLog``. Return its values, and what hooks counted on this rank, row by row, in each step."""
    settings = config("embedding", mlp={**MOE, "every": 2, "dense": DENSE, "bias_rate": 0.02})
    engine_config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", "zero_stage": 1})
    model = build_model(settings, seed=3)
    sharpen_(model)
    stage = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-2}}
    objective = NextToken(world=world)
    engine = Engine(model, objective, StageConfig.model_validate(stage), engine_config, world)
    found = routers(model)
    kinds: list[int | None] = []
    counts = torch.zeros(len(found), 2, EXPERTS, dtype=torch.int64)
    entropy = torch.zeros(len(found), dtype=torch.float64)

    def count(number: int, module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        probabilities = (inputs[0].double() @ module.weight.double().T).softmax(-1)
        for kind, row, experts in zip(kinds, probabilities, outputs[1].tolist(), strict=False):
            if kind is not None:
                entropy[number] -= (row * row.log()).sum().detach()
                for expert in experts:
                    counts[number, kind, expert] += 1

    for number, router in enumerate(found):
        router.register_forward_hook(lambda *call, number=number: count(number, *call))
    spec = media_spec(settings)
    log = RouterLog(Path(folder), EVERY, world, 0, {})
    answer: dict[str, Any] = {"values": [], "counts": [], "entropy": []}
    for step in range(1, STEPS + 1):
        seed = 2 * step + world.rank
        documents = [
            text_document(seed, 3 + seed, VOCAB),
            image_document(spec, seed, 2, [(2, 2)], VOCAB, dummy=seed % 3 == 0),
        ]
        kinds[:] = _kinds(documents)
        counts.zero_()
        entropy.zero_()
        report = engine.train_step([pack(documents, spec)])
        answer["values"].append(log.step(step, report.router, model))
        answer["counts"].append(counts.tolist())
        answer["entropy"].append(entropy.tolist())
    engine.close()
    return answer
