"""Expert parallelism under ZeRO-3: process groups, and parameters that hold the experts of this rank.

    4 ranks, engine.expert_parallel: 2, 8 experts    experts 0-3    experts 4-7
        exchange group {0, 1}                        rank 0         rank 1
        exchange group {2, 3}                        rank 2         rank 3
        shard groups                                 {0, 2}         {1, 3}

ZeRO-3 shards each slice of experts over its shard group, and every other parameter over all ranks. So all ranks hold
equally many values, as without expert parallelism. A slice is a range of the flattened whole parameter, so its shards
are such ranges too: checkpoints and optimizers need no other rule.

DeepSpeed's own layer for this (AutoEP in 0.19) is not used. It replaces the whole block, which renames and splits the
parameters. It rejects the routers' biases. Its checkpoints need the same number of ranks, or a conversion that loses
frozen weights. This module uses one part of it: the stage-3 optimizer shards, gathers and averages a parameter over the
group that the parameter's attributes name, and includes all slices in the gradient norm. Without
``ds_zero_placement_family`` it would divide expert gradients by the size of the shard group instead of the number of
ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as torch_dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mmscale.dist import World
from mmscale.errors import ConfigError, UnsupportedError
from mmscale.nn.expert_parallel import PARTS, ExpertExchange, num_parts
from mmscale.nn.experts import Experts


@dataclass(frozen=True)
class ExpertGroups:
    """The groups of this rank.

    Attributes:
        size: Ranks that together hold all experts (``engine.expert_parallel``).
        name: Name of both groups in DeepSpeed.
        exchange: The ``size`` consecutive ranks that exchange rows.
        shards: The ranks that hold the same experts as this one.
    """

    size: int
    name: str
    exchange: Any
    shards: Any


def check_ranks(size: int, world_size: int) -> None:
    """Check that groups of ``size`` ranks divide the run.

    Raises:
        ConfigError: they do not.
    """
    if world_size % size:
        raise ConfigError(
            f"engine.expert_parallel={size}: world size {world_size} cannot be divided into groups of {size} ranks; "
            f"start a multiple of {size} ranks, or set engine.expert_parallel={math.gcd(size, world_size)}"
        )


def check_experts(size: int, num_experts: int) -> None:
    """Check that ``size`` ranks can hold equally many of ``num_experts`` experts.

    Raises:
        ConfigError: they cannot.
    """
    if num_experts % size:
        raise ConfigError(
            f"engine.expert_parallel={size}: {size} ranks cannot hold equally many of num_experts={num_experts}; set "
            f"engine.expert_parallel={math.gcd(size, num_experts)}"
        )


def expert_groups(world: World, size: int) -> ExpertGroups:
    """Create the groups, or return those of an earlier call. All ranks must call, after ``start_deepspeed``.

    DeepSpeed's function that creates them gives them torch's default timeout instead of the run's.

    Raises:
        ConfigError: ``size`` does not divide the number of ranks.
    """
    from deepspeed.utils import groups

    check_ranks(size, world.world_size)
    name = f"ep_size_{size}"
    if name not in groups._EXPERT_PARALLEL_GROUP:
        timeout = timedelta(seconds=world.timeout_seconds)
        ranks = range(world.world_size)
        for members in [ranks[first : first + size] for first in ranks[::size]]:
            group = torch_dist.new_group(list(members), timeout=timeout)
            if world.rank in members:
                groups._EXPERT_PARALLEL_GROUP[name] = group
                groups._EXPERT_PARALLEL_GROUP_RANKS[name] = members
        for members in [ranks[first::size] for first in range(size)]:
            group = torch_dist.new_group(list(members), timeout=timeout)
            if world.rank in members:
                groups._EXPERT_DATA_PARALLEL_GROUP[name] = group
                groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = members
    return ExpertGroups(size, name, groups._EXPERT_PARALLEL_GROUP[name], groups._EXPERT_DATA_PARALLEL_GROUP[name])


@contextmanager
def split_experts(groups: ExpertGroups) -> Iterator[None]:
    """Let every ``Experts`` module that is built in this context register only this rank's slice of its parameters.

    Enter it before ``deepspeed.zero.Init``, which converts the parameters at the end of the module's construction. Call
    ``attach_exchange`` with the finished model.

    Raises:
        ConfigError: a module's experts cannot be divided equally.
    """

    def keep_slice(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if not isinstance(module, Experts) or parameter is None or num_parts(parameter) > 1:
            return None
        check_experts(groups.size, parameter.shape[0])
        own: Any = nn.Parameter(parameter.new_empty(parameter.shape[0] // groups.size, *parameter.shape[1:]))
        setattr(own, PARTS, groups.size)
        own.ds_zero_placement_family = "autoep_expert"
        own.ds_zero_partition_group_name = groups.name
        own.ds_zero_partition_process_group = groups.shards
        kept: nn.Parameter = own
        return kept

    hook = register_module_parameter_registration_hook(keep_slice)  # type: ignore[arg-type]  # torch's stub: -> None.
    try:
        yield
    finally:
        hook.remove()


def attach_exchange(model: nn.Module, groups: ExpertGroups) -> None:
    """Let each ``Experts`` module that was built in ``split_experts`` exchange rows. Mutates modules and parameters.

    DeepSpeed gathers the weights of a block in one message for each group of ranks. In 0.19.8 the order of these
    messages is that of a set of parameters, thus of memory addresses, which differ between ranks. Ranks that post the
    messages of two NCCL groups in different orders can block each other for ever. So the parameters are sorted first.
    """
    import deepspeed.comm

    for parameter in model.parameters():
        sharded: Any = parameter
        sharded.all_gather_coalesced = partial(_gather_sorted, sharded.all_gather_coalesced)

    # DeepSpeed's function, so that the step's clock counts the time as communication.
    send = deepspeed.comm.all_to_all_single
    for module in model.modules():
        if isinstance(module, Experts):
            module.exchange = ExpertExchange(groups.exchange, groups.size, module.num_experts // groups.size, send)


def _gather_sorted(gather: Callable[..., Any], parameters: Iterable[Any], **options: Any) -> Any:
    return gather(sorted(parameters, key=lambda parameter: parameter.ds_id), **options)


def check_placement(deepspeed_engine: Any, model: nn.Module, size: int, version: str) -> None:
    """Check that a started engine holds the experts of ``model`` in slices, as ``engine.expert_parallel`` requests.

    Args:
        deepspeed_engine: The engine that ``deepspeed.initialize`` returned.
        model: The bare model.
        size: ``engine.expert_parallel``.
        version: Version of DeepSpeed, for the message.

    Raises:
        ConfigError: ``size`` is above 1 and the model has no experts.
        UnsupportedError: this DeepSpeed ignores the groups, and would average the gradients of different experts.
    """
    if size == 1:
        return
    from deepspeed.utils import groups

    slices: list[Any] = [parameter for parameter in model.parameters() if num_parts(parameter) > 1]
    if not slices:
        raise ConfigError(f"engine.expert_parallel={size}: the model has no experts; set engine.expert_parallel=1")
    shards = groups._EXPERT_DATA_PARALLEL_GROUP[f"ep_size_{size}"]
    known = hasattr(deepspeed_engine.optimizer, "_autoep_expert_parallel_group")
    if not known or any(parameter.ds_process_group is not shards for parameter in slices):
        raise UnsupportedError(
            f"engine.expert_parallel={size}: DeepSpeed {version} shards experts over all ranks; use DeepSpeed 0.19.8, "
            "or set engine.expert_parallel=1"
        )
