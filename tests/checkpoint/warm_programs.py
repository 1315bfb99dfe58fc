"""Programs that the ranks of ``test_warm_start.py`` run: save a small multimodal model, and load it into others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmscale.checkpoint import TrainState, save, warm_start
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.errors import CheckpointError
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.engine.programs import gathered
from tests.models.packs import image_document, pack
from tests.models.tiny import LEARNED, VOCAB, config

KIND = "cross_attention"


def settings(
    grid: tuple[int, int] = (2, 4), class_token: bool = True, tiles: dict[str, Any] | None = None, **decoder: Any
) -> ModelConfig:
    positions = {"kind": "learned", "grid": list(grid)}
    vision = {**LEARNED, "positions": positions, "class_token": class_token, "tiles": tiles}
    return config(KIND, vision=vision, **decoder)


def _engine(world: World, model: dict[str, Any], zero: int, seed: int, **stage: Any) -> Engine:
    engine_config = EngineConfig(
        zero_stage=zero, device="cpu", precision="fp32", timeout_seconds=60, persistent_parameter_elements=0
    )
    build = partial(build_model, settings(**model), seed=None)
    net = construct(build, engine_config, world, partial(initialise_, seed=seed))
    values = {"name": "s", "steps": 9, "learning_rate": {"default": 1e-2}, **stage}
    return Engine(net, NextToken(world=world), StageConfig.model_validate(values), engine_config, world)


def save_one(world: World, folder: str) -> str:
    """Train two steps with an average of the weights, and save a checkpoint."""
    engine = _engine(world, {}, 3, 1, ema={"decay": 0.5})
    spec = media_spec(settings())
    for step in range(2):
        engine.train_step([pack([image_document(spec, 10 * step + world.rank, 9, [(2, 4)], VOCAB)], spec)])
    path = save(engine, TrainState(2, 0, 2), Path(folder))
    engine.close()
    return str(path)


def take_cases(world: World, path: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Return report and weights of each case, or its error message."""
    answers = []
    for case in cases:
        engine = _engine(world, case.get("model", {}), case.get("zero", 3), 2, **case.get("stage", {}))
        components = case.get("components")
        try:
            report = warm_start(engine, Path(path), components, ema=case.get("ema", False))
            answers.append({"report": report.__dict__, "text": str(report), "weights": gathered(engine, world)})
        except CheckpointError as error:
            answers.append({"error": str(error).removeprefix("rank 0: ")})
        engine.close()
    return answers


def save_and_take(world: World, folder: str, cases: list[dict[str, Any]]) -> Any:
    path = save_one(world, folder)
    return path, take_cases(world, path, cases)
