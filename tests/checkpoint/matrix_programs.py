"""Programs that the ranks of ``test_matrix.py`` run: multimodal models with dropout, dense and with experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmscale.checkpoint import TrainState, resume, save
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.checkpoint.programs import digest
from tests.models.packs import image_document, in_lane, pack, text_document
from tests.models.tiny import DENSE, MOE, VOCAB, config

LANES = 12
"""Divisible by 1 to 4 ranks."""
CASES = {
    f"{mlp}-{trained}-{precision}": (mlp, trained, precision)
    for mlp in ("dense", "moe")
    for trained in ("all", "frozen encoder")
    for precision in ("fp32", "bf16")
}


def save_all(world: World, folder: str) -> dict[str, Any]:
    """Train each case for two steps, save it, and train one more step. Return state and loss by case."""
    answers = {}
    for name in CASES:
        engine = _engine(world, name)
        for step in range(2):
            _step(engine, world, name, step)
        save(engine, TrainState(step=2, stage_step=2), Path(folder) / name)
        answers[name] = {"saved": digest(engine, world), "next": _step(engine, world, name, 2)}
        engine.close()
    return answers


def resume_all(world: World, folders: list[str]) -> list[dict[str, Any]]:
    """Resume every case in each folder, and train one more step."""
    return [{name: _resume(world, Path(folder), name) for name in CASES} for folder in folders]


def _resume(world: World, folder: Path, name: str) -> dict[str, Any]:
    engine = _engine(world, name)
    resume(engine, folder / name / "step-00000002")
    answer = {"saved": digest(engine, world), "next": _step(engine, world, name, 2)}
    engine.close()
    return answer


def _engine(world: World, name: str) -> Engine:
    mlp, trained, precision = CASES[name]
    settings = config(
        "cross_attention", mlp={**MOE, "bias_rate": 0.01} if mlp == "moe" else DENSE, tie_embeddings=True, dropout=0.1
    )
    engine_config = EngineConfig.model_validate(
        {"zero_stage": 3, "device": "cpu", "precision": precision, "timeout_seconds": 60}
    )
    model = construct(partial(build_model, settings, seed=None), engine_config, world, partial(initialise_, seed=3))
    train = ["all"] if trained == "all" else ["connector", "decoder"]
    values = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-3}, "train": train}
    objective = NextToken(world=world)
    return Engine(model, objective, StageConfig.model_validate(values), engine_config, world)


def _step(engine: Engine, world: World, name: str, step: int) -> list[float]:
    spec = media_spec(engine.model.config)  # type: ignore[arg-type]
    packs = []
    for lane in range(world.rank, LANES, world.world_size):
        seed = step * LANES + lane
        dummy = lane % 3 == 1
        documents = [
            text_document(seed, 5 + lane, VOCAB),
            image_document(spec, seed, 4, [(2, 2), (4, 2)], VOCAB, dummy=dummy),
        ]
        packs.append(in_lane(pack(documents, spec), lane, (3, step)))
    report = engine.train_step(packs)
    return [report.loss, report.grad_norm]
