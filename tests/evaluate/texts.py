"""Held-out texts, and a text model that is scored on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.config import DataConfig
from data_pipeline.shards.manifest import write_manifest
from data_pipeline.shards.writer import ShardWriter
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.evaluate import EvaluationConfig, evaluate
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.models.multimodal import MultimodalModel
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.evaluate.emoji_models import data_config, tiny_model


def write_set(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write samples with one JSON member each; return the manifest."""
    with ShardWriter(folder, "part", max_samples=3) as writer:
        for number, fields in enumerate(rows):
            writer.write(f"{number:04d}", {"json": json.dumps(fields).encode()})
    write_manifest(folder / "set.manifest", writer.shards)
    return folder / "set.manifest"


def text_model() -> MultimodalModel:
    """Return a random model with peaked distributions, so that its choices differ."""
    model = build_model(ModelConfig(decoder=tiny_model().config.decoder), seed=3).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


def text_data() -> DataConfig:
    return DataConfig.model_validate(data_config().model_dump() | {"packing": {"max_tokens": 64}})


def evaluation(held: dict[str, Any], **changes: Any) -> EvaluationConfig:
    block = {"sets": [{"name": "held", **held}], "tokens_per_forward": 90, "rows_per_head": 7}
    return EvaluationConfig.model_validate({**block, **changes})


def score(world: World, held: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the result of one set as plain values."""
    model, config = text_model(), evaluation(held, **changes)
    return asdict(evaluate(model, config, text_data(), media_spec(model.config), world)["held"])


def score_all(world: World, sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the result of each set. Runs on every rank."""
    return [score(world, held) for held in sets]


def score_sharded(world: World, held: dict[str, Any], answers_folder: str) -> dict[str, Any]:
    """Return the results of one set under ZeRO-3 with real shards. Runs on every rank.

    ``dense`` is a model without experts. In ``experts`` each rank holds an equal part of the experts.
    """
    dense = tiny_model().config.decoder.model_dump()
    experts = {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_dim": 16}
    cases = {"dense": (dense, 1), "experts": ({**dense, "mlp": experts}, world.world_size)}
    return {name: _score_sharded(world, held, Path(answers_folder) / name, *case) for name, case in cases.items()}


def _score_sharded(
    world: World, held: dict[str, Any], answers_folder: Path, decoder: dict[str, Any], expert_parallel: int
) -> dict[str, Any]:
    settings = ModelConfig.model_validate({"decoder": decoder})
    config = EngineConfig(
        zero_stage=3,
        device="cpu",
        precision="fp32",
        timeout_seconds=60,
        persistent_parameter_elements=0,
        expert_parallel=expert_parallel,
    )
    model = construct(partial(build_model, settings, seed=None), config, world, partial(initialise_, seed=3))
    stage = StageConfig.model_validate({"name": "all", "steps": 1})
    engine = Engine(model, NextToken(world=world), stage, config, world)
    with engine.inference() as net:
        found = evaluate(net, evaluation(held), text_data(), media_spec(settings), world, answers_folder=answers_folder)
    engine.close()
    return asdict(found["held"])
