"""Programs that the ranks of ``test_restored_state.py`` run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import resume, save, warm_start
from mmscale.checkpoint.share import persistent_buffers
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.checkpoint.programs import state_of
from tests.models.tiny import MOE, config


def save_and_resume(world: World, folder: str, other: str | None = None) -> dict[str, Any]:
    """Save an engine with changed buffers and random state, and resume it in a new engine.

    With ``other``, also resume that checkpoint, which another number of ranks saved.
    """
    engine = _engine(world)
    buffers = persistent_buffers(engine.model)
    for number, values in enumerate(buffers.values()):
        values.copy_(torch.arange(values.numel()).view(values.shape) * (number + 2) - 5)
    torch.manual_seed(100 + world.rank)
    torch.rand(3)
    path = save(engine, state_of(world, 3), Path(folder))
    answer: dict[str, Any] = {"path": str(path), "saved": _plain(buffers), "next": torch.rand(4).tolist()}
    engine.close()

    fresh = _engine(world)
    answer["fresh"] = _plain(persistent_buffers(fresh.model))
    torch.manual_seed(7)
    state = resume(fresh, path)
    answer |= {"drawn": torch.rand(4).tolist(), "resumed": _plain(persistent_buffers(fresh.model))}
    answer["counts"] = [state.step, state.tokens, state.samples, state.extra, fresh.stage_step]
    fresh.close()

    third = _engine(world)
    warm_start(third, path)
    answer["warm"] = _plain(persistent_buffers(third.model))
    if other is not None:
        torch.manual_seed(7 + world.rank)
        resume(third, Path(other))
        answer["drawn of other"] = torch.rand(4).tolist()
    third.close()
    return answer


def _engine(world: World) -> Engine:
    settings = config("embedding", mlp={**MOE, "bias_rate": 0.02})
    engine_config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32", "zero_stage": 2})
    model = construct(partial(build_model, settings, seed=None), engine_config, world, partial(initialise_, seed=3))
    stage = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-2}}
    return Engine(model, NextToken(world=world), StageConfig.model_validate(stage), engine_config, world)


def _plain(buffers: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in buffers.items()}
