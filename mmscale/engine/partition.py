"""Which values of which parameter this rank owns, whatever the ZeRO stage.

    parameter (flattened)   0 ........ start [ master | exp_avg | exp_avg_sq ) stop ........ numel

For: checkpoints, which save and load ranges and never need to know the stage. All views are writable; after writing
masters, ``Partition.publish`` carries them into the weights that the model computes with.

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
from mmscale.optim import full_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedRange:
    """A contiguous part of one parameter.

    Attributes:
        name: Name of the parameter in the model.
        start: First value, in the flattened parameter.
        stop: One past the last.
        master: float32 view ``(stop - start,)``; for a frozen parameter its weights in the compute format.
        moments: ``exp_avg`` and ``exp_avg_sq`` views of the same length; empty for a frozen parameter.
    """

    name: str
    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor]

    @property
    def trained(self) -> bool:
        return bool(self.moments)


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
    """

    def __init__(self, model: nn.Module, deepspeed_engine: Any, zero_stage: int, world: World) -> None:
        self.model = model
        self.optimizer = deepspeed_engine.optimizer
        self.basic_optimizer = deepspeed_engine.basic_optimizer
        self.zero_stage = zero_stage
        self.world = world
        self._replicas = self._find_replicas()

    def _find_replicas(self) -> dict[int, Tensor]:
        """Stage 0: the fp32 tensor that is optimized for each parameter (the parameter itself in fp32)."""
        if self.zero_stage:
            return {}
        if not hasattr(self.optimizer, "fp32_groups"):
            return {id(p): p for p in self.model.parameters()}
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def flat_masters(self) -> list[Tensor]:
        """The tensors that the optimizer steps, in its order; its state is keyed by them."""
        if self.zero_stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self.basic_optimizer.param_groups for parameter in group["params"]]

    def ensure_state(self) -> None:
        """Creates zero moments where the optimizer has not stepped yet (AdamW makes them on its first step)."""
        for master in self.flat_masters():
            state = self.basic_optimizer.state[master]
            if not state:
                # Fused and capturable steps want the count on the device of the values.
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)

    def optimizer_steps(self) -> int:
        """Steps that AdamW has taken; equal for all parameters, since all are stepped together."""
        self.ensure_state()
        masters = self.flat_masters()
        return int(self.basic_optimizer.state[masters[0]]["step"]) if masters else 0

    def set_optimizer_steps(self, steps: int) -> None:
        """Writes AdamW's step count, on which its bias correction depends."""
        self.ensure_state()
        for master in self.flat_masters():
            self.basic_optimizer.state[master]["step"].fill_(steps)

    def owned(self, *, whole: bool = False) -> Iterator[OwnedRange]:
        """This rank's range of every parameter; together the ranks' ranges cover each parameter exactly once.

        Args:
            whole: Where weights are replicated (stage 0, and frozen parameters below stage 3), give the whole
                parameter instead of this rank's share: what must be filled when loading.
        """
        self.ensure_state()
        for name, parameter in self.model.named_parameters():
            yield from (
                self._trained(name, parameter, whole)
                if parameter.requires_grad
                else self._frozen(name, parameter, whole)
            )

    def _range(self, parameter: nn.Parameter, whole: bool) -> tuple[int, int]:
        numel = parameter.numel() if self.zero_stage < 3 else int(parameter.ds_numel)  # type: ignore[attr-defined]
        return (0, numel) if whole and self.zero_stage < 3 else share(numel, self.world.rank, self.world.world_size)

    def _frozen(self, name: str, parameter: nn.Parameter, whole: bool) -> Iterator[OwnedRange]:
        start, stop = self._range(parameter, whole)
        if start < stop:
            if self.zero_stage == 3:
                # The tail of a shard beyond the parameter's end is padding; it is never written.
                values = parameter.ds_tensor.data.view(-1)[: stop - start]  # type: ignore[attr-defined]
            else:
                values = parameter.data.view(-1)[start:stop]
            yield OwnedRange(name, start, stop, values, {})

    def _trained(self, name: str, parameter: nn.Parameter, whole: bool) -> Iterator[OwnedRange]:
        if self.zero_stage in (1, 2):
            yield from self._flat_fragment(name, parameter)
            return
        start, stop = self._range(parameter, whole)
        if start == stop:
            return
        if self.zero_stage == 3:
            view = self.optimizer.get_local_fp32_param
            values = {key: view(parameter, key).data.view(-1)[: stop - start] for key in (None, *MOMENTS)}
        else:
            master = self._replicas[id(parameter)]
            state = self.basic_optimizer.state[master]
            values = {key: state[key].view(-1)[start:stop] for key in MOMENTS}
            values[None] = master.data.view(-1)[start:stop]
        yield OwnedRange(name, start, stop, values[None], {key: values[key] for key in MOMENTS})

    def _flat_fragment(self, name: str, parameter: nn.Parameter) -> Iterator[OwnedRange]:
        """Stages 1 and 2 deal the concatenation of a group, so a rank's part of a parameter starts anywhere."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return
        group = self.basic_optimizer.param_groups[mapping.param_group_index]
        state = self.basic_optimizer.state[group["params"][0]]
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        moments = {key: state[key].narrow(0, high.start, high.numel) for key in MOMENTS}
        yield OwnedRange(name, low.start, low.start + low.numel, mapping.hp_fragment.data, moments)

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


def parameter_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Shape and whether it is trained, of every parameter by name; tied parameters once."""
    return {
        name: {"shape": list(full_shape(parameter)), "trained": parameter.requires_grad}
        for name, parameter in model.named_parameters()
    }
