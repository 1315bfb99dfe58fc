"""Functions that the ranks of the engine tests run."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.errors import EngineError
from mmscale.nn.expert_parallel import full_shape
from mmscale.optim.stages import StageConfig
from tests.engine.toy import ToyModel, ToyObjective, initialise_, toy_batch

LANES = 4


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "all",
        "steps": 40,
        "learning_rate": {"default": 1e-2, "vision": 5e-3},
        "warmup_steps": 3,
        "clip": 0.5,
    }
    return StageConfig.model_validate(values | changes)


def make_engine(world: World, zero: int = 3, stage_changes: dict[str, Any] | None = None, **config: Any) -> Engine:
    config = {"precision": "fp32", **config}  # Not auto: the numbers must not depend on this machine's processor.
    engine_config = EngineConfig(zero_stage=zero, device="cpu", timeout_seconds=60, **config)  # type: ignore[arg-type]
    model = construct(ToyModel, engine_config, world, initialise_)
    return Engine(model, ToyObjective(), stage(**(stage_changes or {})), engine_config, world)


def lanes_of(world: World, step: int, *, empty_lane: int | None = None) -> list[Any]:
    """This rank's lanes as one microbatch each: LANES / W microbatches."""
    return [toy_batch(step, lane, empty=lane == empty_lane) for lane in range(world.rank, LANES, world.world_size)]


def train_cases(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    """Run several engines in the same ranks, since starting ranks takes longer than training."""
    return [train(world, **case) for case in cases]


def train(
    world: World,
    steps: int = 6,
    bad_step: int | None = None,
    null_step: int | None = None,
    look: bool = False,
    record: bool = False,
    **options: Any,
) -> Any:
    """Losses, norms and, at the end, all weights by name."""
    engine = make_engine(world, **options)
    reports, history = [], []
    for step in range(steps):
        history.extend([gathered(engine, world)] if record else [])
        batches = lanes_of(world, step, empty_lane=2 if step % 2 else None)
        if step == bad_step and world.rank == world.world_size - 1:
            batches[-1].pixels.fill_(float("inf"))
        if step == null_step:
            batches = [toy_batch(step, lane, empty=True) for lane in range(world.rank, LANES, world.world_size)]
        report = engine.train_step(batches)
        if look:
            with engine.inference() as model:
                model.head(model(toy_batch(step, world.rank)))
                model(toy_batch(step, 3))
        reports.append(
            [report.loss, report.grad_norm, report.weight, report.applied, report.metrics.get("accuracy", 0)]
        )
    answer = {"reports": reports, "weights": gathered(engine, world), "steps": engine.partition.optimizer_steps()}
    if record:
        answer["history"] = history
    if engine.stage.ema:
        with engine.inference(ema=True):
            answer["averages"] = gathered(engine, world)
        answer["weights"] = gathered(engine, world)
    engine.close()
    return answer


def guarded(world: World, cases: list[dict[str, Any]]) -> list[Any]:
    """Run several engines whose updates a hook may reject."""
    return [_guarded(world, **case) for case in cases]


def _guarded(
    world: World,
    zero: int,
    precision: str,
    order: list[int],
    refused: int | None = None,
    state_bits: int = 32,
    clip: Any = 0.5,
) -> Any:
    """Train on the batches ``order``. The last rank alone rejects the update at index ``refused``."""
    optimizer = {"kind": "adamw", "state_bits": state_bits}
    changes = {"schedule": "constant", "warmup_steps": 0, "optimizer": optimizer, "clip": clip}
    engine = make_engine(world, zero, changes, precision=precision)
    asked: list[tuple[float, float]] = []

    def rejection_reason(loss: float, norm: float) -> str | None:
        asked.append((loss, norm))
        return "chosen" if len(asked) - 1 == refused and world.rank == world.world_size - 1 else None

    reports = [engine.train_step(lanes_of(world, step), rejection_reason) for step in order]
    state = [
        [
            owned.name,
            owned.start,
            owned.master.tolist(),
            *(values.float().tolist() for values in owned.moments.values()),
        ]
        for owned in engine.partition.owned()
    ]
    answer = {
        "asked": asked,
        "reports": [[report.loss, report.grad_norm, report.applied] for report in reports],
        "state": state,
        "steps": engine.partition.optimizer_steps(),
    }
    engine.close()
    return answer


def lonely(world: World, where: str) -> str:
    """Let rank 1 die before or inside the second step. Return rank 0's error."""
    engine = make_engine(world)
    engine.train_step(lanes_of(world, 0))
    if world.rank == 1 and where == "between":
        os._exit(0)
    if world.rank == 1:
        engine.model.decoder.norm.register_forward_hook(lambda *_: os._exit(0))
    try:
        engine.train_step(lanes_of(world, 1))
    except EngineError as error:
        return str(error)
    return "no complaint"


def uneven(world: World) -> str:
    """Give rank 1 one microbatch too many."""
    engine = make_engine(world)
    try:
        engine.train_step([toy_batch(0, lane) for lane in range(1 + world.rank)])
    except EngineError as error:
        return str(error)
    return "no complaint"


def average_cases(world: World, cases: list[dict[str, Any]]) -> Any:
    """Run the cases. Also return the error for an average that the stage does not keep."""
    answers = train_cases(world, cases)
    engine = make_engine(world)
    try:
        with engine.inference(ema=True):
            return answers, "no complaint"
    except EngineError as error:
        return answers, str(error)


def gathered(engine: Engine, world: World) -> dict[str, list[float]]:
    """Return all masters, gathered from the ranks' ranges."""
    whole = {}
    for name, entry in ((n, p) for n, p in engine.model.named_parameters()):
        whole[name] = torch.zeros(math.prod(full_shape(entry)), dtype=torch.float32)
    for owned in engine.partition.owned():
        whole[owned.name][owned.start : owned.stop] += owned.master.float()
    for values in whole.values():
        if world.world_size > 1:
            torch.distributed.all_reduce(values)
    return {name: values.tolist() for name, values in whole.items()}
