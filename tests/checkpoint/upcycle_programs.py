"""Programs that the ranks of ``test_upcycle.py`` run: start models with experts from an imported dense checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmscale.checkpoint import read_manifest, warm_start
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
from tests.models.packs import pack, text_document


def with_mlp(path: Path, **mlp: Any) -> ModelConfig:
    """Return the model of the checkpoint at ``path`` with experts of the dense width, or with changed keys."""
    values = read_manifest(path).model_config_values
    assert values is not None
    mlp = {"kind": "moe", "expert_dim": values["decoder"]["mlp"]["hidden_dim"], **mlp}
    return ModelConfig.model_validate({**values, "decoder": {**values["decoder"], "mlp": mlp}})


def upcycle_cases(world: World, path: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Return report, weights and logits of each case, and the experts after one training step."""
    answers = []
    for case in cases:
        config = with_mlp(Path(path), **case["mlp"])
        settings = EngineConfig(
            zero_stage=case["zero"],
            expert_parallel=case.get("expert_parallel", 1),
            device="cpu",
            precision="fp32",
            timeout_seconds=60,
            persistent_parameter_elements=0,
        )
        net = construct(partial(build_model, config, seed=None), settings, world, partial(initialise_, seed=2))
        stage = {"name": "s", "steps": 9, "learning_rate": {"default": 1e-2}, "upcycle": True}
        engine = Engine(net, NextToken(world=world), StageConfig.model_validate(stage), settings, world)
        report = warm_start(engine, Path(path), upcycle=True)
        batch = pack([text_document(3, 12, config.decoder.vocab_size)], media_spec(config))
        net.eval()
        with torch.no_grad():
            logits = net.head(net(batch).hidden)
        net.train()
        answer = {"text": str(report), "missing": report.missing, "unused": report.unused, "logits": logits.tolist()}
        answer["weights"] = gathered(engine, world)
        engine.train_step([batch])
        answer["trained"] = gathered(engine, world)
        answers.append(answer)
        engine.close()
    return answers
