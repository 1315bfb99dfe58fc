"""Code that the ranks of ``test_adapters.py`` run: a base model, and adapters that are trained on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmscale.checkpoint import TrainState, choose, resume, save, warm_start
from mmscale.checkpoint.config import CheckpointConfig
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
from tests.checkpoint.programs import digest
from tests.models.packs import image_document, in_lane, pack, text_document
from tests.models.tiny import VOCAB, config

LANES = 4
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2, "dropout": 0.2, "targets": {"decoder": ["q_proj", "mlp.up_proj"]}},
    "dora": {"kind": "dora", "rank": 2, "targets": {"decoder": "all", "connector": "all", "vision": ["q_proj"]}},
}
STAGE: dict[str, Any] = {
    "name": "tune",
    "steps": 9,
    "train": ["adapters"],
    "learning_rate": {"default": 1e-2},
    "optimizer": {"kind": "adamw", "weight_decay": 0.5},
    "ema": {"decay": 0.5},
}


def settings(kind: str | None) -> ModelConfig:
    """Return the model with these adapters; None: the base."""
    base = config("cross_attention", tie_embeddings=True).model_dump()
    return ModelConfig.model_validate({**base, "adapters": ADAPTERS[kind] if kind else None})


def lane(step: int, number: int) -> Any:
    spec = media_spec(settings(None))
    docs = [text_document(step * LANES + number, 5 + 3 * number, VOCAB)]
    docs.append(image_document(spec, step * LANES + number, 4, [(2, 2), (4, 2)], VOCAB, dummy=number == 1))
    return in_lane(pack(docs, spec), number, (3, step))


def engine_of(world: World, kind: str | None, stage: dict[str, Any], zero: int) -> Engine:
    block = EngineConfig(
        zero_stage=zero,  # type: ignore[arg-type]
        device="cpu",
        precision="fp32",
        timeout_seconds=60,
        persistent_parameter_elements=0,
        activation_checkpointing=kind == "lora",
    )
    model = construct(partial(build_model, settings(kind), seed=None), block, world, partial(initialise_, seed=3))
    return Engine(model, NextToken(world=world), StageConfig.model_validate(stage), block, world)


def train(engine: Engine, world: World, first: int, last: int) -> list[float]:
    mine = range(world.rank, LANES, world.world_size)
    return [engine.train_step([lane(step, number) for number in mine]).loss for step in range(first, last)]


def save_base(world: World, folder: str) -> Any:
    """Train a base model for two steps and save it. Return its loss in the next step."""
    engine = engine_of(world, None, {"name": "base", "steps": 9, "learning_rate": {"default": 1e-2}}, 3)
    train(engine, world, 0, 2)
    save(engine, TrainState(2, 0, 2), Path(folder))
    return train(engine, world, 2, 3)[0]


def tune(world: World, kind: str, base: str, folder: str) -> Any:
    """Train adapters for three steps, save, and train two more. Then begin two other stages from the checkpoint."""
    engine = engine_of(world, kind, STAGE, 3)
    report = warm_start(engine, Path(base), lasting=True)
    losses = train(engine, world, 2, 5)
    path = save(engine, TrainState(3, 0, 3), Path(folder))
    saved = digest(engine, world)
    after = train(engine, world, 5, 7)
    end = digest(engine, world)
    engine.close()

    again = engine_of(world, kind, {**STAGE, "ema": None}, 3)
    warm_start(again, path)
    save(again, TrainState(0, 1, 0), Path(folder).with_name("again"))
    again.close()
    whole = engine_of(world, kind, {**STAGE, "train": ["all"], "ema": None}, 3)
    warm_start(whole, path)
    save(whole, TrainState(0, 1, 0), Path(folder).with_name("whole"))
    whole.close()
    derived = list(report.derived)
    return {"losses": losses, "saved": saved, "after": after, "end": end, "path": str(path), "derived": derived}


def resume_tuning(world: World, kind: str, path: str, zero: int) -> Any:
    """Resume and train the same two steps."""
    engine = engine_of(world, kind, STAGE, zero)
    resume(engine, Path(path))
    answer = {"saved": digest(engine, world), "after": train(engine, world, 5, 7)}
    answer["end"] = digest(engine, world)
    engine.close()
    return answer


def choice(world: World, folder: str) -> Any:
    """Return the choice of a run that sets damaged checkpoints aside, or its error."""
    try:
        return str(choose(world, Path(folder), CheckpointConfig(on_damage="previous")))
    except CheckpointError as error:
        return str(error)
