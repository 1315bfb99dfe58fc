"""Code that the ranks of ``test_new_rows.py`` run: training the new tokens of a frozen model."""

from __future__ import annotations

from functools import partial
from typing import Any

from data_pipeline.batch import MultimodalBatch
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.engine.programs import gathered
from tests.models.packs import image_document, pack, text_document
from tests.models.tiny import VOCAB, config

OLD, NEW, SEED, STEPS, LANES = VOCAB - 8, 8, 3, 5, 4
STAGE: dict[str, Any] = {
    "name": "words",
    "steps": STEPS,
    "train": ["extra_tokens"],
    "learning_rate": {"default": 1e-2},
    "optimizer": {"kind": "adamw", "weight_decay": 0.5, "betas": [0.9, 0.95]},
    "clip": 0.5,
}


def settings(tied: bool) -> ModelConfig:
    return config("cross_attention", tie_embeddings=tied, vocab_size=OLD, extra_tokens={"rows": NEW})


def lane(model: ModelConfig, step: int, number: int) -> MultimodalBatch:
    """Return a pack of lane ``number``. Lanes differ in length; lane 1 contains no new token."""
    spec, seed = media_spec(model), step * LANES + number
    vocab = OLD if number == 1 else VOCAB
    docs = [text_document(seed, 5 + 3 * number, vocab), image_document(spec, seed, 6, [(2, 2)], vocab)]
    return pack(docs, spec)


def train_cases(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    return [_train(world, **case) for case in cases]


def _train(world: World, tied: bool, zero: int, recompute: bool) -> Any:
    engine_config = EngineConfig(
        zero_stage=zero,
        device="cpu",
        precision="fp32",
        timeout_seconds=60,
        persistent_parameter_elements=0,
        activation_checkpointing=recompute,
    )
    model = settings(tied)
    net = construct(partial(build_model, model, seed=None), engine_config, world, partial(initialise_, seed=SEED))
    engine = Engine(net, NextToken(world=world), StageConfig.model_validate(STAGE), engine_config, world)
    mine = range(world.rank, LANES, world.world_size)
    losses = [engine.train_step([lane(model, step, number) for number in mine]).loss for step in range(STEPS)]
    kept = {owned.name for owned in engine.partition.owned() if owned.moments}
    answer = {"losses": losses, "weights": gathered(engine, world), "moments": sorted(kept)}
    engine.close()
    return answer
