"""Build a model for the engine. Under ZeRO-3 no rank ever holds the whole model.

DeepSpeed shards each parameter as soon as its module is constructed. Initial values follow, one module at a time. They
depend only on the seed and the parameter's name, so each rank computes a whole module, keeps its own range, and sends
nothing. The weights are equal at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from mmscale.dist import World, start_deepspeed
from mmscale.engine.config import EngineConfig
from mmscale.engine.ds_config import deepspeed_config
from mmscale.engine.expert_parallel import attach_exchange, expert_groups, split_experts
from mmscale.engine.partition import own_range
from mmscale.engine.precision import choose_precision
from mmscale.nn.expert_parallel import full_shape

M = TypeVar("M", bound=nn.Module)
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]


class Initialise(Protocol):
    """Write initial values. Enter ``gather`` with the parameters of one module at a time."""

    def __call__(self, model: Any, *, gather: Gather) -> object: ...


def construct(build: Callable[[], M], config: EngineConfig, world: World, initialise: Initialise) -> M:
    """Build a model for ``Engine``. All ranks must call.

    Args:
        build: Constructs the bare model without initial values, on the host.
        config: Stage 3 shards the model from the start. Below stage 3 every rank builds the whole model.
        world: This rank.
        initialise: Writes the same values on every rank, for example ``mmscale.nn.init.initialise_`` with a seed.

    Raises:
        ConfigError: ``expert_parallel`` does not divide the number of ranks or of experts.
    """
    gather = partial(_own_range_only, world)
    if config.zero_stage < 3:
        model = build()
        initialise(model, gather=gather)
        return model
    start_deepspeed(world)
    import deepspeed

    precision = choose_precision(config, world.device)
    dictionary = deepspeed_config(config, precision, clip=0.0, device_type=world.device.type)
    # Set the format in the dictionary: on a CPU DeepSpeed replaces a ``dtype`` argument by bf16 (operator precedence).
    groups = expert_groups(world, config.expert_parallel) if config.expert_parallel > 1 else None
    with split_experts(groups) if groups else nullcontext(), deepspeed.zero.Init(config_dict_or_path=dictionary):
        model = build()
    if groups:
        attach_exchange(model, groups)
    initialise(model, gather=gather)
    return model


@contextmanager
def _own_range_only(world: World, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Replace sharded parameters by whole, uninitialised ones. On exit keep this rank's range. Sends nothing.

    A parameter that holds a slice of the experts is replaced by one with all experts.
    """
    sharded: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    placeholders = [parameter.data for parameter in sharded]
    for parameter in sharded:
        device = parameter.ds_tensor.device
        parameter.data = torch.empty(full_shape(parameter), dtype=torch.float32, device=device)
    yield
    for parameter, placeholder in zip(sharded, placeholders, strict=True):
        shard = parameter.ds_tensor.data.view(-1)
        start, stop = own_range(parameter, world)
        values = parameter.data.view(-1)[start:stop]
        shard[: values.numel()].copy_(values)
        parameter.data = placeholder
