"""Programs that the ranks of ``test_matrix.py`` run: multimodal models with dropout, dense and with experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.batch import MultimodalBatch
from data_pipeline.media_spec import MediaSpec
from mmscale.checkpoint import TrainState, resume, save
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.nn.init import GatherParameters, initialise_
from mmscale.nn.router import routers
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.checkpoint.programs import digest
from tests.models.packs import image_document, pack, text_document
from tests.models.tiny import DENSE, MOE, VOCAB, config

LANES = 12
"""Divisible by 1 to 4 ranks."""
PACKS = {"dense": 1, "moe": 3}
"""Largest number of packs in a microbatch. With experts, 1 to 4 ranks have 4, 2, 2 and 1 microbatches."""
EXPERTS = {**MOE, "bias_rate": 0.01, "balance_coefficient": 0.1, "z_coefficient": 0.01}
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
    settings = config("cross_attention", mlp=EXPERTS if mlp == "moe" else DENSE, tie_embeddings=True, dropout=0.1)
    engine_config = EngineConfig.model_validate(
        {"zero_stage": 3, "device": "cpu", "precision": precision, "timeout_seconds": 60}
    )
    model = construct(partial(build_model, settings, seed=None), engine_config, world, _initialise)
    train = ["all"] if trained == "all" else ["connector", "decoder"]
    values = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-3}, "train": train}
    objective = NextToken(world=world)
    return Engine(model, objective, StageConfig.model_validate(values), engine_config, world)


def _initialise(model: nn.Module, *, gather: GatherParameters) -> None:
    """Set initial values. Those of routers give unequal probabilities, as in trained routers."""
    for router in routers(model):
        router.init_std = 0.5  # type: ignore[assignment]
    initialise_(model, 3, gather)


def _microbatch(spec: MediaSpec, lanes: list[int], step: int) -> MultimodalBatch:
    """Return the packs of some lanes in one microbatch. Every third lane has a dummy image."""
    documents = [
        [
            text_document(step * LANES + lane, 5 + lane, VOCAB),
            image_document(spec, step * LANES + lane, 4, [(2, 2), (4, 2)], VOCAB, dummy=lane % 3 == 1),
        ]
        for lane in lanes
    ]
    tokens = tuple(sum(len(document.tokens) for document in each) for each in documents)
    batch = pack([document for each in documents for document in each], spec)
    return replace(batch, lanes=tuple(lanes), lane_tokens=tokens, dropout_key=(3, step))


def _step(engine: Engine, world: World, name: str, step: int) -> list[float]:
    spec = media_spec(engine.model.config)  # type: ignore[arg-type]
    lanes, size = [*range(world.rank, LANES, world.world_size)], PACKS[CASES[name][0]]
    report = engine.train_step(
        [_microbatch(spec, lanes[first : first + size], step) for first in range(0, len(lanes), size)]
    )
    return [report.loss, report.grad_norm]
