"""A function that the rank of ``test_step_flops.py`` runs."""

from __future__ import annotations

from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.engine import Engine
from mmscale.metrics.step_counts import step_flops
from mmscale.models.build import build_model, media_spec
from mmscale.objectives.choice import choose_objective
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, pack
from tests.models.tiny import MOE, VOCAB, config
from tests.objectives.pairs import SOFTMAX, model_config

WIDE: dict[str, Any] = {"attention": {"num_heads": 8, "num_kv_heads": 4}, "hidden_dim": 64}
SEQUENCE = {**MOE, "balance": "sequence", "balance_coefficient": 0.1}
CASES: dict[str, tuple[Any, bool, int]] = {
    "global": (config("embedding", **WIDE, mlp={**SEQUENCE, "balance": "global"}), True, 2),
    "one microbatch": (config("embedding", **WIDE, mlp={**SEQUENCE, "balance": "global"}), True, 1),
    "sequence": (config("embedding", **WIDE, mlp=SEQUENCE), False, 2),
    "pairs": (model_config(SOFTMAX), False, 2),
}
"""Model, activation checkpointing, and microbatches of a step."""


def operations(world: World) -> dict[str, tuple[float, int]]:
    """Return ``hardware_flops`` of a step and the operations that torch counts in it, of each case."""
    answer = {}
    for name, (settings, checkpointing, number) in CASES.items():
        options = EngineConfig.model_validate(
            {"device": "cpu", "precision": "fp32", "zero_stage": 0, "activation_checkpointing": checkpointing}
        )
        stage = StageConfig.model_validate({"name": "all", "steps": 9, "learning_rate": {"default": 1e-3}})
        objective = choose_objective(settings, stage, world, ())
        engine = Engine(build_model(settings, attention="sdpa", seed=3), objective, stage, options, world)
        spec = media_spec(settings)
        # Documents of one length, for which the kernel adds no padding. Those of a dummy use no expert.
        batches = [
            pack([image_document(spec, each, 40, [(2, 4)], VOCAB, dummy=each == 2) for each in range(3)], spec)
            for _ in range(number)
        ]
        told = step_flops(engine, batches)["hardware_flops"]
        # The counter does not count the fused kernel.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            engine.train_step(batches)
        answer[name] = (told, counter.get_total_flops())
        engine.close()
    return answer
