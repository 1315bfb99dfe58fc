"""Tiny runs of classifiers, and sets of drawings of bundled emoji that a tiny model is scored on."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mmscale.checkpoint.imports.write import manifest_of_weights, new_share, write_checkpoint
from mmscale.checkpoint.share import TensorPiece
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.evaluate import EvaluationConfig, evaluate
from mmscale.models.build import build_model, media_spec
from mmscale.models.config import ModelConfig
from mmscale.nn.init import initialise_
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.evaluate.drawing_models import drawing_data, model_block
from tests.evaluate.emoji_models import EMOJI, data_config, tiny_model

TRAIN = EMOJI / "shards" / "heldout-concept.manifest"
SIDE = 6


def write_run(run: Path, kind: str = "contrastive") -> Path:
    """Write the ``config.yaml`` and a checkpoint of a random model, as a run of it would leave them."""
    model = tiny_model(kind)
    pieces = [TensorPiece(f"{name}|frozen", 0, values.detach()) for name, values in model.named_parameters()]
    manifest = manifest_of_weights(model, "fp32", "made", {})
    write_checkpoint(run / "checkpoints", manifest, iter([new_share(0, pieces, run)]))
    data = data_config().model_dump(mode="json", exclude_unset=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(run), "data": data}))
    return run


def drawing_set(classifier: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "drawn",
        "kind": "drawings",
        "classifier": str(classifier),
        "manifest": str(EMOJI / "shards" / "heldout-both.manifest"),
        "field": "name",
        "template": " {value}",
        "prompt": "{name}",
        "size": SIDE,
        "choices": 4,
        "limit": 9,
        "batch_size": 4,
        "guidance": 2.0,
        "train": str(TRAIN),
        "train_limit": 12,
        **changes,
    }


def evaluation(classifier: Path, **changes: Any) -> EvaluationConfig:
    block = {"sets": [drawing_set(classifier, **changes)], "captions": None, "tokens_per_forward": 96}
    return EvaluationConfig.model_validate(block)


def score_sharded(world: World, classifier: str, answers_folder: str) -> dict[str, Any]:
    """Return the result of the set under ZeRO-3 with real shards. Runs on every rank."""
    settings = ModelConfig.model_validate(model_block("vocabulary"))
    config = EngineConfig(
        zero_stage=3, device="cpu", precision="fp32", timeout_seconds=60, persistent_parameter_elements=0
    )
    model = construct(partial(build_model, settings, seed=None), config, world, partial(initialise_, seed=3))
    stage = StageConfig.model_validate({"name": "all", "steps": 1, "train": ["decoder"]})
    engine = Engine(model, NextToken(world=world), stage, config, world)
    data, spec = drawing_data("vocabulary"), media_spec(settings)
    with engine.inference() as net:
        block = evaluation(Path(classifier))
        found = evaluate(net, block, data, spec, world, answers_folder=Path(answers_folder))
    engine.close()
    return asdict(found["drawn"])
