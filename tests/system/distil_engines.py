"""Engines of ``test_distillation.py``: save teachers, and train students with sharded teachers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import MultimodalBatch
from mmscale.checkpoint import TrainState, save
from mmscale.checkpoint.load import fill_frozen
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.metrics.step_counts import step_flops
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.objectives.teacher import Teacher
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, pack, text_document
from tests.models.tiny import MOE, VOCAB, config

LANES, STEPS = 4, 2
SHARES = [(0.5, 2.0), (0.25, 1.0)]
"""Share and temperature of each teacher."""
EXTRA: dict[str, Any] = {"vocab_size": VOCAB - 8, "extra_tokens": {"rows": 8}}
STAGE: dict[str, Any] = {
    "name": "all",
    "steps": STEPS,
    "learning_rate": {"default": 1e-2},
    "schedule": "constant",
    "optimizer": {"kind": "adamw", "weight_decay": 0.0},
    "z_loss": 0.01,
    "clip": 0.0,
}


def models(kind: str | None) -> tuple[ModelConfig, list[ModelConfig]]:
    """Return a student and one or two teachers with other widths, depths and block kinds, and the same vocabulary."""
    student = config(kind, num_layers=2, tie_embeddings=True, **EXTRA)
    teachers = [config(kind, hidden_dim=48), config(kind, mlp=MOE, tie_embeddings=True, **EXTRA)]
    return student, teachers if kind is None else teachers[:1]


def lane(kind: str | None, step: int, number: int) -> MultimodalBatch:
    """Return lanes of different lengths. For a model with images, lane 1 has only text and a dummy document."""
    spec = media_spec(models(kind)[0])
    docs = [text_document(step * LANES + number, 5 + 3 * number, VOCAB)]
    if kind is not None:
        docs.append(image_document(spec, step * LANES + number, 4, [(2, 2)], VOCAB, dummy=number == 1))
    return pack(docs, spec)


def engine_config(zero: int, **changes: Any) -> EngineConfig:
    values = {"device": "cpu", "precision": "fp32", "timeout_seconds": 60, "live_parameter_elements": 0, **changes}
    return EngineConfig.model_validate({"zero_stage": zero, **values})


def save_teacher(world: World, folder: Path, settings: ModelConfig, kind: str | None, seed: int) -> Path:
    """Change the initial values by one step."""
    engine_settings = engine_config(3)
    model = construct(
        partial(build_model, settings, seed=None), engine_settings, world, partial(initialise_, seed=seed)
    )
    engine = Engine(model, NextToken(world=world), StageConfig.model_validate(STAGE), engine_settings, world)
    engine.train_step([lane(kind, 90, world.rank)])
    path = save(engine, TrainState(1, 0, 1), folder)
    engine.close()
    return path


def learn(world: World, folder: Path, kind: str | None, paths: list[Path], zero: int, **changes: Any) -> dict[str, Any]:
    """Return losses, metrics and gradient norms of the student's steps, and the teachers' values on this rank."""
    settings, student = engine_config(zero, **changes), models(kind)[0]
    teachers = []
    for path, wanted, (share, temperature) in zip(paths, models(kind)[1], SHARES, strict=False):
        fill = partial(fill_frozen, path=path, zero_stage=zero, world=world)
        model = construct(partial(build_model, wanted, seed=None), settings, world, fill)
        teachers.append(Teacher(model, share, temperature))
    net = construct(partial(build_model, student, seed=None), settings, world, partial(initialise_, seed=3))
    stage = StageConfig.model_validate(STAGE)
    engine = Engine(net, NextToken(stage.z_loss, teachers, world), stage, settings, world)
    steps = []
    for step in range(STEPS):
        mine = [lane(kind, step, number) for number in range(world.rank, LANES, world.world_size)]
        flops = list(step_flops(engine, mine).values())
        report = engine.train_step(mine)
        steps.append({"loss": report.loss, "norm": report.grad_norm, "flops": flops, **report.metrics})
        with engine.inference() as asked, torch.no_grad():
            asked(mine[0])
    whole = sum(parameter.numel() for teacher in teachers for parameter in teacher.parameters())
    path = save(engine, TrainState(STEPS, 0, STEPS), folder / f"student-{zero}-{kind}-{settings.precision}")
    counted = sum(count.total for count in engine.parameter_counts.values())
    engine.close()
    return {"steps": steps, "whole": whole, "path": str(path), "counted": counted}


def train_engines(world: World, folder: Path) -> dict[str, Any]:
    """Return by kind the paths of the teachers, and the results of the student in each case."""
    answers: dict[str, Any] = {}
    for kind, cases in (
        (None, [(0, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")]),
        ("hybrid", [(3, "fp32")]),
    ):
        paths = [
            save_teacher(world, folder / f"teacher-{kind}-{number}", settings, kind, 10 + number)
            for number, settings in enumerate(models(kind)[1])
        ]
        learned = {
            f"{zero}-{precision}": learn(world, folder, kind, paths, zero, precision=precision)
            for zero, precision in cases
        }
        answers[str(kind)] = {"teachers": [str(path) for path in paths], **learned}
    return answers
