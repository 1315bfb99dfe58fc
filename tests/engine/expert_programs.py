"""Programs that the ranks of ``test_expert_parallel.py`` run: a tiny multimodal model with 8 experts in each block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.construct import construct
from mmscale.engine.engine import Engine
from mmscale.models.build import build_model, media_spec
from mmscale.models.parameter_counts import describe_parameters
from mmscale.nn.expert_parallel import full_shape
from mmscale.nn.experts import Experts
from mmscale.nn.init import initialise_
from mmscale.nn.router import routers
from mmscale.objectives.next_token import NextToken
from mmscale.optim.stages import StageConfig
from tests.models.packs import image_document, in_lane, pack, text_document
from tests.models.tiny import MOE, VOCAB, config

LANES = 4
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
EXPERTS = {**MOE, "num_experts": 8, "bias_rate": 0.01}
REGULARISED = {**EXPERTS, "expert_dropout": 0.2, "jitter": 0.01, "capacity_factor": 1.0}
"""Random masks that travel with the rows, and a limit for each expert and microbatch."""


def make_engine(
    world: World,
    expert_parallel: int = 1,
    *,
    mlp: dict[str, Any] = EXPERTS,
    hidden_dim: int = 32,
    stage: dict[str, Any] | None = None,
    **engine: Any,
) -> Engine:
    settings = config("embedding", mlp=mlp, num_layers=2, hidden_dim=hidden_dim, attention=ATTENTION)
    engine_config = EngineConfig.model_validate(
        {"device": "cpu", "precision": "fp32", "timeout_seconds": 60, "expert_parallel": expert_parallel, **engine}
    )
    model = construct(partial(build_model, settings, seed=None), engine_config, world, partial(initialise_, seed=3))
    values: dict[str, Any] = {"name": "all", "steps": 9, "learning_rate": {"default": 1e-2}, "clip": 0.5}
    objective = NextToken(world=world)
    return Engine(model, objective, StageConfig.model_validate(values | (stage or {})), engine_config, world)


def batches(engine: Engine, world: World, step: int) -> list[Any]:
    """Return this rank's lanes, one microbatch each, with lengths of their own; every third lane is a dummy pack."""
    spec = media_spec(engine.model.config)  # type: ignore[arg-type]
    packs = []
    for lane in range(world.rank, LANES, world.world_size):
        seed = step * LANES + lane
        image = image_document(spec, seed, 3 + lane, [(2, 2)], VOCAB, dummy=lane == 2)
        packs.append(in_lane(pack([text_document(seed, 2 + 3 * lane, VOCAB), image], spec), lane, (3, step)))
    return packs


def whole(engine: Engine, world: World) -> dict[str, Tensor]:
    """Return masters and optimizer state by ``parameter|kind``, gathered from the ranks' ranges. All ranks must call.

    After the first step of AdamW, ``exp_avg`` is a tenth of the clipped gradient.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        for kind in ("weights", *(engine.partition.kinds(name) if parameter.requires_grad else ())):
            found[f"{name}|{kind}"] = torch.zeros(int(torch.Size(full_shape(parameter)).numel()))
    for owned in engine.partition.owned():
        for kind, values in {"weights": owned.master, **owned.moments}.items():
            found[f"{owned.name}|{kind}"][owned.start : owned.stop] += values.float()
    if world.world_size > 1:
        for values in found.values():
            torch.distributed.all_reduce(values)
    return found


def train_cases(world: World, cases: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Train an engine for each case, and let rank 0 write its state to ``folder/NAME.pt``. Return the reports."""
    answers = {}
    for name, case in cases.items():
        answers[name] = _train(world, Path(folder) / f"{name}.pt", **case)
    return answers


def _train(
    world: World,
    file: Path,
    steps: int = 1,
    favourites: list[int] | None = None,
    look: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train for some steps. Report the values of each step, and how many rows each rank's experts got.

    Args:
        world: This rank.
        file: For the state.
        steps: Number of steps.
        favourites: Experts that the biases make every row choose.
        look: Whether to score a batch without gradients after the steps.
        options: Of ``make_engine``.
    """
    engine = make_engine(world, **options)
    first = {key: values for key, values in whole(engine, world).items() if key.endswith("|weights")}
    rows = _count_rows(engine)
    for router in routers(engine.model) if favourites else ():
        router.bias_steps[favourites] = 10**6
    reports = []
    for step in range(steps):
        report = engine.train_step(batches(engine, world, step), component_norms=True)
        reports.append([report.loss, report.grad_norm, *report.component_grad_norms.values()])
    state = {"first": first, "last": whole(engine, world)}
    if look:
        with engine.inference() as model:
            scores = engine._objective(model, batches(engine, world, 7)[0])
        state["scores"] = torch.zeros(world.world_size)
        state["scores"][world.rank] = scores.loss_sum
        torch.distributed.all_reduce(state["scores"])
    if world.is_main:
        torch.save(state, file)
    counts = {name: [each.total, each.trained] for name, each in engine.parameter_counts.items()}
    text = describe_parameters(engine.model.components())  # type: ignore[operator]
    held = sum(owned.stop - owned.start for owned in engine.partition.owned())
    engine.close()
    return {"reports": reports, "rows": rows, "counts": counts, "text": text, "held": held}


def _count_rows(engine: Engine) -> list[int]:
    """Return a list that gets the number of rows of each call of this rank's experts."""
    found: list[int] = []
    for module in engine.model.modules():
        if isinstance(module, Experts) and module.exchange is not None:
            exchange = module.exchange.exchange

            def note(rows: Tensor, sent: list[int], received: list[int], exchange: Any = exchange) -> Tensor:
                found.append(sum(received))
                result: Tensor = exchange(rows, sent, received)
                return result

            module.exchange.exchange = note  # type: ignore[method-assign]
    return found
