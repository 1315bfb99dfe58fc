"""An optimizer on shards without DeepSpeed: concatenated parameters, cut at arbitrary places between ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World
from mmscale.engine.optimizers.build import build_optimizer
from mmscale.engine.optimizers.shards import FlatMaster, ParameterShard
from mmscale.engine.partition import shard_range
from mmscale.optim.schedule import parameter_groups
from tests.engine.programs import stage

SHAPES = {"wide": (5, 7), "experts": (3, 4, 6), "tall": (9, 2), "square": (4, 4)}
RATE = 1e-2


class Stack(nn.Module):
    """Matrices of several shapes, and stacked ones."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradient(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def steps_on_shards(world: World, optimizers: list[dict[str, Any]], steps: int) -> list[dict[str, list[float]]]:
    """Return the whole parameters after ``steps`` steps of each optimizer, gathered from the ranks' shards."""
    return [_steps(world, optimizer, steps) for optimizer in optimizers]


def _steps(world: World, optimizer: dict[str, Any], steps: int) -> dict[str, list[float]]:
    plan, model = stage(optimizer=optimizer), Stack()
    (group,) = parameter_groups(model, {"all": [*model.parameters()]}, plan)
    whole = torch.cat([parameter.detach().view(-1) for parameter in group["params"]])
    low, high = shard_range(whole.numel(), world.rank, world.world_size)
    padded = -(-whole.numel() // world.world_size) + 1
    flat = nn.Parameter(torch.full((padded,), float("nan")))  # NaN padding: no optimizer may read it.
    flat.data[: high - low] = whole[low:high]
    group |= {"params": [flat], "lr": RATE}
    made: Any = build_optimizer([group], plan, clip_here=False)
    made.attach([FlatMaster(flat, group, _shards(low, high), True)], world)
    made.state[flat].update({kind: torch.zeros_like(flat.data) for kind in group["state_kinds"]}, step=torch.zeros(()))
    for step in range(steps):
        flat.grad = torch.full_like(flat.data, float("nan"))
        flat.grad[: high - low] = torch.cat([values.view(-1) for values in gradient(step).values()])[low:high]
        made.step()
    result = torch.zeros_like(whole)
    result[low:high] = flat.data[: high - low]
    if world.world_size > 1:
        torch.distributed.all_reduce(result)
    parts = result.split([int(torch.Size(shape).numel()) for shape in SHAPES.values()])
    return {name: part.tolist() for name, part in zip(SHAPES, parts, strict=True)}


def _shards(low: int, high: int) -> tuple[ParameterShard, ...]:
    shards, offset = [], 0
    for name, shape in SHAPES.items():
        numel = int(torch.Size(shape).numel())
        start, stop = max(low, offset), min(high, offset + numel)
        if start < stop:
            shards.append(ParameterShard(name, shape, start - low, start - offset, stop - offset))
        else:
            shards.append(ParameterShard(name, shape, 0, 0, 0))
        offset += numel
    return tuple(shards)
