"""Which values of which parameter this rank owns, whatever the ZeRO stage.

    parameter (flattened)   0 ........ start [ master | exp_avg | exp_avg_sq | ema ) stop ........ numel

For: checkpoints, which save and load ranges and never need to know the stage or the optimizer; optimizers that look at
whole matrices; the average of the weights. All views are writable; after writing masters, ``Partition.publish`` carries
them into the weights that the model computes with.

DeepSpeed offers no public way to do this at every stage; the attributes it is done with were read in version 0.19 and
are all in this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World
from mmscale.engine.optimizers.eight_bit import QuantisedRange, zero_moment
from mmscale.engine.optimizers.shards import FlatMaster, Piece
from mmscale.optim.schedule import full_shape

EMA = "ema"


@dataclass(frozen=True)
class OwnedRange:
    """A contiguous part of one parameter.

    Attributes:
        name: Name of the parameter in the model.
        start: First value, in the flattened parameter.
        stop: One past the last.
        master: float32 view ``(stop - start,)``; for a frozen parameter its weights in the compute format.
        moments: Views of the same length of what is kept beside the master, by kind: the optimizer's own (AdamW's
            ``exp_avg`` and ``exp_avg_sq``), and ``ema``. Empty for a frozen parameter. Whatever keeps the values,
            ``float()`` reads and ``copy_`` writes them.
        trained: Whether the stage trains the parameter.
    """

    name: str
    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor | QuantisedRange]
    trained: bool


def share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The range of ``rank`` when ``numel`` values are dealt in equal pieces; maybe empty for high ranks."""
    piece = -(-numel // world_size)
    return min(rank * piece, numel), min((rank + 1) * piece, numel)


class Partition:
    """Views into a DeepSpeed engine's weights and optimizer state.

    Args:
        model: The bare model (no LossGraph): its parameter names are the names of record.
        deepspeed_engine: What ``deepspeed.initialize`` returned.
        zero_stage: 0-3.
        world: This rank.
        averaged: Whether an average of the masters is kept beside them.

    Attributes:
        masters: The tensors that the optimizer steps, and which parts of which parameters they hold.
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
        self._places = {piece.name: (master, piece) for master in self.masters for piece in master.pieces}

    def _find_replicas(self) -> dict[int, Tensor]:
        """Stage 0: the fp32 tensor that is optimized for each parameter (the parameter itself in fp32)."""
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
            # Stage 1 in bf16 has a wrapper of its own, with another name for the same list.
            wrapper = self.optimizer
            dealt_groups = wrapper.bit16_groups if hasattr(wrapper, "bit16_groups") else wrapper.bf16_groups
            return [
                FlatMaster(group["params"][0], group, tuple(_fragment(names[id(p)], p) for p in parameters), True)
                for group, parameters in zip(groups, dealt_groups, strict=True)
            ]
        whole = {id(master): names[low] for low, master in self._replicas.items()}
        return [
            FlatMaster(p, group, (Piece(whole[id(p)], tuple(p.shape), 0, 0, p.numel()),), False)
            for group in groups
            for p in group["params"]
        ]

    def _part(self, name: str, parameter: nn.Parameter) -> Piece:
        """Stage 3: equal pieces of every parameter; the tail of a shard beyond the parameter's end is padding."""
        _, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start, stop = share(int(parameter.ds_numel), self.world.rank, self.world.world_size)  # type: ignore[attr-defined]
        return Piece(name, full_shape(parameter), int(offset), start, stop)

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is kept beside the master of a trained parameter, whichever rank holds it."""
        return self._kinds(self._places[name][0])

    def _kinds(self, master: FlatMaster) -> tuple[str, ...]:
        return (*master.group["state_kinds"], *self._extra_kinds)

    def ensure_state(self) -> None:
        """Creates the state of an optimizer that has not stepped yet: zeros, and as average the masters."""
        for master in self.masters:
            values, state = master.values, self.basic_optimizer.state[master.values]
            if not state:
                # Fused and capturable steps want the count on the device of the values.
                state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)
                for kind in master.group["state_kinds"]:
                    state[kind] = zero_moment(master, kind)
                if self._extra_kinds:
                    state[EMA] = values.detach().clone()

    def optimizer_steps(self) -> int:
        """Steps that the optimizer has taken; equal for all parameters, since all are stepped together."""
        self.ensure_state()
        return int(self.basic_optimizer.state[self.masters[0].values]["step"]) if self.masters else 0

    def set_optimizer_steps(self, steps: int) -> None:
        """Writes the optimizer's step count, on which bias corrections and decay rates depend."""
        self.ensure_state()
        for master in self.masters:
            self.basic_optimizer.state[master.values]["step"].fill_(steps)

    def whole_state(self) -> dict[str, Tensor]:
        """Small optimizer state that every rank holds whole, ``parameter|kind`` to a writable tensor."""
        found: dict[str, Tensor] = getattr(self.basic_optimizer, "whole_state", dict)()
        return found

    def begin_average(self) -> None:
        """Sets the average of the weights, if there is one, to the masters."""
        self.ensure_state()
        for master, average in self._averages():
            average.copy_(master)

    def update_average(self, decay: float) -> None:
        """Moves the average towards the masters: ``average * decay + master * (1 - decay)``."""
        for master, average in self._averages():
            average.lerp_(master, 1 - decay)

    def swap_average(self) -> None:
        """Exchanges masters and average, and publishes. All ranks must call, twice."""
        for master, average in self._averages():
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.publish()

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        if not self._extra_kinds:
            return []
        state = self.basic_optimizer.state
        return [(master.values.data, state[master.values][EMA]) for master in self.masters]

    def owned(self, *, whole: bool = False) -> Iterator[OwnedRange]:
        """This rank's range of every parameter; together the ranks' ranges cover each parameter exactly once.

        Args:
            whole: Where weights are replicated (stage 0, and frozen parameters below stage 3), give the whole
                parameter instead of this rank's share: what must be filled when loading.
        """
        self.ensure_state()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield from self._trained(name, whole)
            else:
                yield from _frozen(name, parameter, self.zero_stage, self.world, whole)

    def _trained(self, name: str, whole: bool) -> Iterator[OwnedRange]:
        master, piece = self._places[name]
        start, stop = piece.start, piece.stop
        if not master.shared_out and not whole:
            start, stop = share(stop, self.world.rank, self.world.world_size)
        if start < stop:
            state = self.basic_optimizer.state[master.values]
            moments = {kind: _range_of(state[kind], piece, start, stop) for kind in self._kinds(master)}
            yield OwnedRange(name, start, stop, piece.of(master.values.data, start, stop), moments, True)

    def publish(self) -> None:
        """Carries the masters into the weights the model computes with. All ranks must call after writing masters."""
        if self.zero_stage == 3:
            self._publish_sharded()
        elif hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        elif hasattr(self.optimizer, "fp32_groups"):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(self._replicas[id(parameter)].data)

    def _publish_sharded(self) -> None:
        for owned in self.owned():
            if owned.trained:
                shard = self.model.get_parameter(owned.name).ds_tensor  # type: ignore[attr-defined]
                shard.data.view(-1)[: owned.stop - owned.start].copy_(owned.master)
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)  # Drops the stale whole copies ...
            persistent[0].all_gather(persistent)  # ... and makes fresh ones from the shards.


def frozen_ranges(model: nn.Module, zero_stage: int, world: World) -> Iterator[OwnedRange]:
    """What this rank must fill of a model in which nothing learns: its shards at stage 3, else every parameter.

    Args:
        model: From ``construct``; no engine need exist.
        zero_stage: It was constructed for.
        world: This rank.
    """
    for name, parameter in model.named_parameters():
        yield from _frozen(name, parameter, zero_stage, world, whole=True)


def _frozen(name: str, parameter: nn.Parameter, zero_stage: int, world: World, whole: bool) -> Iterator[OwnedRange]:
    numel = parameter.numel() if zero_stage < 3 else int(parameter.ds_numel)  # type: ignore[attr-defined]
    whole &= zero_stage < 3
    start, stop = (0, numel) if whole else share(numel, world.rank, world.world_size)
    if start < stop:
        if zero_stage == 3:
            # The tail of a shard beyond the parameter's end is padding; it is never written.
            values = parameter.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
        else:
            values = parameter.data.view(-1)[start:stop]
        yield OwnedRange(name, start, stop, values, {}, False)


def _range_of(kept: Any, piece: Piece, start: int, stop: int) -> Tensor | QuantisedRange:
    if isinstance(kept, Tensor):
        return piece.of(kept, start, stop)
    return QuantisedRange(kept[piece], start - piece.start, stop - piece.start)


def _fragment(name: str, parameter: nn.Parameter) -> Piece:
    """Stages 1 and 2 deal the concatenation of a group, so a rank's part of a parameter starts anywhere."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Piece(name, tuple(parameter.shape), 0, 0, 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(name, tuple(parameter.shape), high.start, low.start, low.start + low.numel)


def parameter_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape and whether it is trained, of every parameter by name; tied parameters once."""
    return {
        name: {"shape": list(full_shape(parameter)), "trained": parameter.requires_grad}
        for name, parameter in model.named_parameters()
    }
