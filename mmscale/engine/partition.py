"""The values and gradients of each parameter that this rank owns, at any ZeRO stage.

    parameter (flattened)   0 ........ start [ master | exp_avg | exp_avg_sq | ema ) stop ........ numel

Used by checkpoints, which save and load ranges independently of the ZeRO stage and the optimizer, by optimizers that
need whole matrices, and for the average of the weights. All views are writable. After writing masters, call
``Partition.publish``: it copies them into the weights that the model computes with.

DeepSpeed has no public interface for this at every stage. This file reads private attributes of DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World
from mmscale.engine.optimizers.eight_bit import QuantisedRange, zero_moment
from mmscale.engine.optimizers.shards import FlatMaster, ParameterShard
from mmscale.nn.expert_parallel import full_shape, num_parts

EMA = "ema"


@dataclass(frozen=True)
class OwnedRange:
    """A contiguous part of one parameter.

    Attributes:
        name: Name of the parameter in the model.
        start: Index of the first value in the flattened parameter.
        stop: Index after the last value.
        master: float32 view ``(stop - start,)``; for a frozen parameter its weights in the compute format.
        moments: Views of the same length on the optimizer's state, by kind (AdamW: ``exp_avg`` and ``exp_avg_sq``), and
            on the average (``ema``). Empty for a frozen parameter. ``float()`` reads the values and ``copy_`` writes
            them, also in 8-bit state.
        trained: Whether the stage trains the parameter.
    """

    name: str
    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor | QuantisedRange]
    trained: bool


def shard_range(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the range of ``rank`` if ``numel`` values are cut into equal shards; the last ranks' may be empty."""
    length = -(-numel // world_size)
    return min(rank * length, numel), min((rank + 1) * length, numel)


def own_range(parameter: nn.Parameter, world: World) -> tuple[int, int]:
    """Return the range of the flattened whole parameter that this rank's shard covers at stage 3; it may be empty.

    ZeRO-3 cuts a parameter into equal shards, one for each rank. A slice of experts is cut into one for each rank that
    holds the same slice.
    """
    numel, parts = int(parameter.ds_numel), num_parts(parameter)  # type: ignore[attr-defined]
    first = world.rank % parts * numel
    start, stop = shard_range(numel, world.rank // parts, world.world_size // parts)
    return first + start, first + stop


class Partition:
    """Views into a DeepSpeed engine's weights and optimizer state.

    Args:
        model: The bare model (no LossGraph), whose parameter names checkpoints use.
        deepspeed_engine: The engine that ``deepspeed.initialize`` returned.
        zero_stage: 0-3.
        world: This rank.
        averaged: Whether to keep an average of the masters.

    Attributes:
        masters: The tensors that the optimizer steps, with the parts of parameters that they hold.
    """

    def __init__(
        self, model: nn.Module, deepspeed_engine: Any, zero_stage: int, world: World, *, averaged: bool = False
    ) -> None:
        self.model = model
        self.optimizer = deepspeed_engine.optimizer
        self.basic_optimizer = deepspeed_engine.basic_optimizer
        self.zero_stage = zero_stage
        self.world = world
        self._extra_kinds = (EMA,) if averaged else ()
        self._replicas = self._find_replicas()
        self.masters = self._find_masters()
        self._shards = {shard.name: (master, shard) for master in self.masters for shard in master.shards}

    def _find_replicas(self) -> dict[int, Tensor]:
        """Return the fp32 tensor that stage 0 optimizes for each parameter (in fp32 the parameter itself)."""
        if self.zero_stage:
            return {}
        if not hasattr(self.optimizer, "fp32_groups"):
            return {id(p): p for p in self.model.parameters()}
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _find_masters(self) -> list[FlatMaster]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.basic_optimizer.param_groups
        if self.zero_stage == 3:
            index_of = self.optimizer.sub_group_to_group_id
            dealt = enumerate(zip(self.optimizer.fp32_partitioned_groups_flat, self.optimizer.fp16_groups, strict=True))
            return [
                FlatMaster(flat, groups[index_of[i]], tuple(self._part(names[id(p)], p) for p in parameters), True)
                for i, (flat, parameters) in dealt
            ]
        if self.zero_stage:
            # Stage 1 in bf16 has its own wrapper class, with another name for the same list.
            wrapper = self.optimizer
            dealt_groups = wrapper.bit16_groups if hasattr(wrapper, "bit16_groups") else wrapper.bf16_groups
            return [
                FlatMaster(group["params"][0], group, tuple(_fragment(names[id(p)], p) for p in parameters), True)
                for group, parameters in zip(groups, dealt_groups, strict=True)
            ]
        whole = {id(master): names[low] for low, master in self._replicas.items()}
        return [
            FlatMaster(p, group, (ParameterShard(whole[id(p)], tuple(p.shape), 0, 0, p.numel()),), False)
            for group in groups
            for p in group["params"]
        ]

    def _part(self, name: str, parameter: nn.Parameter) -> ParameterShard:
        """Return a parameter's shard at stage 3, which pads the last shard to the length of the others."""
        _, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start, stop = own_range(parameter, self.world)
        return ParameterShard(name, full_shape(parameter), int(offset), start, stop)

    def kinds(self, name: str) -> tuple[str, ...]:
        """Return the kinds of optimizer state of a trained parameter, equal on all ranks."""
        return self._kinds(self._shards[name][0])

    def _kinds(self, master: FlatMaster) -> tuple[str, ...]:
        return (*master.group["state_kinds"], *self._extra_kinds)

    def ensure_state(self) -> None:
        """Create missing optimizer state: zero moments, step 0, and the masters as average."""
        for master in self.masters:
            values, state = master.values, self.basic_optimizer.state[master.values]
            if not state:
                # Fused and capturable steps need the count on the device of the values.
                state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)
                for kind in master.group["state_kinds"]:
                    state[kind] = zero_moment(master, kind)
                if self._extra_kinds:
                    state[EMA] = values.detach().clone()

    def optimizer_steps(self) -> int:
        """Return the number of optimizer steps, which is equal for all parameters; 0 without trained parameters."""
        self.ensure_state()
        return int(self.basic_optimizer.state[self.masters[0].values]["step"]) if self.masters else 0

    def set_optimizer_steps(self, steps: int) -> None:
        """Set the optimizer's step count, on which bias corrections and decay rates depend."""
        self.ensure_state()
        for master in self.masters:
            self.basic_optimizer.state[master.values]["step"].fill_(steps)

    def whole_state(self) -> dict[str, Tensor]:
        """Return the optimizer state that every rank holds whole: ``parameter|kind`` to a writable tensor."""
        found: dict[str, Tensor] = getattr(self.basic_optimizer, "whole_state", dict)()
        return found

    def begin_average(self) -> None:
        """Set the average of the weights, if the stage keeps one, to the masters."""
        self.ensure_state()
        for master, average in self._averages():
            average.copy_(master)

    def update_average(self, decay: float) -> None:
        """Update the average: ``average * decay + master * (1 - decay)``."""
        for master, average in self._averages():
            average.lerp_(master, 1 - decay)

    def swap_average(self) -> None:
        """Exchange masters and average, then publish. All ranks must call; a second call restores the masters."""
        for master, average in self._averages():
            saved = master.clone()
            master.copy_(average)
            average.copy_(saved)
        self.publish()

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        if not self._extra_kinds:
            return []
        state = self.basic_optimizer.state
        return [(master.values.data, state[master.values][EMA]) for master in self.masters]

    def owned(self, *, whole: bool = False) -> Iterator[OwnedRange]:
        """Yield this rank's range of each parameter, and create missing optimizer state first.

        A parameter without values on this rank is left out. Without ``whole``, the ranges of all ranks cover each
        parameter exactly once.

        Args:
            whole: For loading: yield replicated parameters (stage 0, and frozen ones below stage 3) whole, instead of
                this rank's range.
        """
        self.ensure_state()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield from self._trained(name, whole)
            else:
                yield from _frozen(name, parameter, self.zero_stage, self.world, whole)

    def _trained(self, name: str, whole: bool) -> Iterator[OwnedRange]:
        master, shard = self._shards[name]
        start, stop = shard.start, shard.stop
        if not master.is_sharded and not whole:
            start, stop = shard_range(stop, self.world.rank, self.world.world_size)
        if start < stop:
            state = self.basic_optimizer.state[master.values]
            moments = {kind: _range_of(state[kind], shard, start, stop) for kind in self._kinds(master)}
            yield OwnedRange(name, start, stop, shard.view_of(master.values.data, start, stop), moments, True)

    def publish(self) -> None:
        """Copy the masters into the weights that the model computes with. All ranks must call after writing masters."""
        if self.zero_stage == 3:
            self._publish_sharded()
        elif hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        elif hasattr(self.optimizer, "fp32_groups"):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(self._replicas[id(parameter)].data)

    def write_rows(self, name: str, values: Tensor, chosen: Tensor) -> None:
        """Write rows of a parameter and of its average, set their moments to 0, and publish. All ranks must call.

        Args:
            name: Name of the parameter.
            values: float32, shape of the whole parameter, equal on all ranks.
            chosen: bool, one for each row: whether it is written.
        """
        mask = chosen.unsqueeze(1).expand_as(values).flatten()
        for owned in self.owned(whole=True):
            if owned.name != name:
                continue
            own, new = mask[owned.start : owned.stop], values.flatten()[owned.start : owned.stop]
            own, new = own.to(owned.master.device), new.to(owned.master.device)
            owned.master.copy_(torch.where(own, new, owned.master.float()))
            for kind, kept in owned.moments.items():
                kept.copy_(torch.where(own, new if kind == EMA else 0.0, kept.float()))
        if self.model.get_parameter(name).requires_grad:
            self.publish()

    def _publish_sharded(self) -> None:
        for owned in self.owned():
            if owned.trained:
                shard = self.model.get_parameter(owned.name).ds_tensor  # type: ignore[attr-defined]
                shard.data.view(-1)[: owned.stop - owned.start].copy_(owned.master)
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # Drop the outdated whole copies.
            persistent[0].all_gather(persistent)  # Gather new ones from the shards.


def frozen_ranges(model: nn.Module, zero_stage: int, world: World) -> Iterator[OwnedRange]:
    """Yield the ranges to fill on this rank when loading a frozen model: its shards at stage 3, else whole parameters.

    Args:
        model: A model that ``construct`` built. It needs no engine.
        zero_stage: The stage that the model was built for.
        world: This rank.
    """
    for name, parameter in model.named_parameters():
        yield from _frozen(name, parameter, zero_stage, world, whole=True)


def _frozen(name: str, parameter: nn.Parameter, zero_stage: int, world: World, whole: bool) -> Iterator[OwnedRange]:
    if zero_stage == 3:
        start, stop = own_range(parameter, world)
    else:
        numel = parameter.numel()
        start, stop = (0, numel) if whole else shard_range(numel, world.rank, world.world_size)
    if start < stop:
        if zero_stage == 3:
            # A shard may end with padding, which is not part of the range.
            values = parameter.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
        else:
            values = parameter.data.view(-1)[start:stop]
        yield OwnedRange(name, start, stop, values, {}, False)


def _range_of(kept: Any, shard: ParameterShard, start: int, stop: int) -> Tensor | QuantisedRange:
    if isinstance(kept, Tensor):
        return shard.view_of(kept, start, stop)
    return QuantisedRange(kept[shard], start - shard.start, stop - shard.start)


def _fragment(name: str, parameter: nn.Parameter) -> ParameterShard:
    """Return a parameter's shard at stages 1 and 2, which cut the concatenation of a group into equal shards."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return ParameterShard(name, tuple(parameter.shape), 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return ParameterShard(name, tuple(parameter.shape), high.start, low.start, low.start + low.numel)


def parameter_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return ``shape`` and ``trained`` of each parameter by name; tied parameters occur once."""
    return {
        name: {"shape": list(full_shape(parameter)), "trained": parameter.requires_grad}
        for name, parameter in model.named_parameters()
    }


def square_sums(
    model: nn.Module, owner: Mapping[str, str], components: Iterable[str], optimizer: Any, zero_stage: int, world: World
) -> dict[str, float]:
    """Return this rank's part of each component's squared gradient norm. The sum over ranks is the squared norm.

    Call it between the backward pass and the optimizer's step. It takes one pass over the averaged gradient. DeepSpeed
    computes the norm of the whole gradient itself, and its public interface gathers the gradient of one parameter at a
    time, in one message each. Stages 1 to 3 hold a list of tensors for each optimizer group. With an offloaded
    optimizer, and at stage 1 in bf16, they hold one flat tensor for each group. Stage 0 holds the parameters' ``grad``.

    Args:
        model: The bare model.
        owner: Component of each parameter, by parameter name.
        components: The trained components; each gets an entry on every rank, in this order.
        optimizer: DeepSpeed's wrapper of the optimizer, or at stage 0 in fp32 the optimizer.
        zero_stage: 0-3.
        world: This rank.
    """
    squares = dict.fromkeys(components, 0.0)
    held = _whole_gradients(model, owner, world) if zero_stage == 0 else _own_gradients(optimizer, zero_stage)
    for component, gradients in held:
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
            squares[component] += float(norms.double().square().sum())
    scale = float(getattr(optimizer, "loss_scale", 1.0) or 1.0)
    return {component: value / scale**2 for component, value in squares.items()}


def _whole_gradients(model: nn.Module, owner: Mapping[str, str], world: World) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the gradients at stage 0. Every rank holds the whole gradient, so only rank 0 counts it."""
    if not world.is_main:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            yield owner[name], [parameter.grad]


def _own_gradients(optimizer: Any, zero_stage: int) -> Iterator[tuple[str, list[Tensor]]]:
    groups = optimizer.optimizer.param_groups
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # Stage 1 in bf16 has its own wrapper class.
        for group, part in zip(groups, optimizer.fp32_groups_gradient_flat_partition, strict=True):
            yield group["component"], [part]
        return
    if zero_stage == 3:
        masters = optimizer.fp32_partitioned_groups_flat
        numbers = [optimizer.sub_group_to_group_id[index] for index in range(len(masters))]
        offloaded = optimizer.offload_optimizer
    else:
        masters = optimizer.single_partition_of_fp32_groups
        numbers = list(range(len(masters)))
        offloaded = optimizer.cpu_offload
    for index, number in enumerate(numbers):
        held = [masters[index].grad] if offloaded else optimizer.averaged_gradients.get(index)
        yield groups[number]["component"], [gradient for gradient in held or () if gradient is not None]
