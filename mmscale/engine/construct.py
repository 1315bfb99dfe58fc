"""Building a model so that no rank ever holds all of it.

Under ZeRO-3 each parameter is cut into shards as soon as its module is constructed. Initial values come afterwards, one
module at a time, and depend on the seed and the parameter's name alone: every rank computes the whole of one module,
keeps its own range, and has nothing to send. The weights are the same at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from mmscale.dist import World, start_deepspeed
from mmscale.engine.config import EngineConfig
from mmscale.engine.ds_config import deepspeed_config
from mmscale.engine.precision import choose_precision

M = TypeVar("M", bound=nn.Module)
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]


class Initialise(Protocol):
    """Writes first values, entering ``gather`` with the parameters of one module at a time."""

    def __call__(self, model: Any, *, gather: Gather) -> object: ...


def construct(build: Callable[[], M], config: EngineConfig, world: World, initialise: Initialise) -> M:
    """Builds a model for ``Engine``. All ranks must call.

    Args:
        build: Constructs the bare model without first values, on the host.
        config: Stage 3 shards from the start; below, every rank builds the whole model.
        world: This rank.
        initialise: Writes the same values on every rank: ``mmscale.nn.init.initialise_`` with its seed bound.
    """
    if config.zero_stage < 3:
        model = build()
        initialise(model, gather=_own_range_only)
        return model
    start_deepspeed(world)
    import deepspeed

    precision = choose_precision(config, world.device)
    dictionary = deepspeed_config(config, precision, clip=0.0, device_type=world.device.type)
    # The format comes from the dictionary: a ``dtype`` argument is replaced by bf16 on a CPU (operator precedence).
    with deepspeed.zero.Init(config_dict_or_path=dictionary):
        model = build()
    initialise(model, gather=_own_range_only)
    return model


@contextmanager
def _own_range_only(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Makes sharded parameters whole, unset and writable, then keeps each rank's own range. No communication."""
    sharded: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    placeholders = [parameter.data for parameter in sharded]
    for parameter in sharded:
        device = parameter.ds_tensor.device
        parameter.data = torch.empty(tuple(parameter.ds_shape), dtype=torch.float32, device=device)
    yield
    for parameter, placeholder in zip(sharded, placeholders, strict=True):
        shard = parameter.ds_tensor.data.view(-1)
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        values = parameter.data.view(-1)[rank * shard.numel() : (rank + 1) * shard.numel()]
        shard[: values.numel()].copy_(values)
        parameter.data = placeholder
