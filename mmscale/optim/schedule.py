"""Optimizer groups, schedules, and clipping where nobody else clips.

Groups are known by name, ``component/decay``, ``component/no_decay`` and for Muon ``component/matrices``, never by
index: DeepSpeed drops empty groups and shifts the indices of the rest. A schedule is a pure function of the step within
the stage; it has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.errors import ConfigError
from mmscale.models.vocabulary import LanguageHead
from mmscale.optim.config import AdafactorConfig, AdamWConfig, MuonConfig
from mmscale.optim.stages import ALL, StageConfig

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
_NO_DECAY_ENDINGS = ("bias", "gate")
_TABLE_ENDING = "embedding"


Components = Mapping[str, Sequence[nn.Parameter]]
"""Parameters by the name of their component: what a model's ``components()`` gives."""


def component_of_parameters(model: nn.Module, components: Components) -> dict[str, str]:
    """The component of every parameter, by parameter name.

    Raises:
        ConfigError: a parameter belongs to no component, or to two.
    """
    owner: dict[int, str] = {}
    for component, parameters in components.items():
        for parameter in parameters:
            if owner.setdefault(id(parameter), component) != component:
                raise ConfigError(f"a parameter belongs to the components {owner[id(parameter)]} and {component}")
    orphans = [name for name, parameter in model.named_parameters() if id(parameter) not in owner]
    if orphans:
        raise ConfigError(f"parameters that belong to no component: {orphans[:5]}; components() must cover the model")
    return {name: owner[id(parameter)] for name, parameter in model.named_parameters()}


def trained_components(components: Iterable[str], stage: StageConfig) -> tuple[str, ...]:
    """The components that ``stage`` trains, of those that the model has.

    Raises:
        ConfigError: the stage names a component that the model lacks.
    """
    present = sorted(components)
    wanted = present if stage.train == (ALL,) else stage.train
    missing = (set(wanted) | stage.named_components) - set(present)
    if missing:
        raise ConfigError(f"stage {stage.name}: the model has no component {sorted(missing)}; it has {present}")
    return tuple(wanted)


def freeze(model: nn.Module, components: Components, stage: StageConfig) -> None:
    """Lets exactly the components of ``stage`` learn. Mutates ``requires_grad``.

    Raises:
        ConfigError: the stage names a component that the model lacks.
    """
    names = trained_components(components, stage)
    owner = component_of_parameters(model, components)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(owner[name] in names)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 has left an empty placeholder."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases and gates (stacked expert biases are 2-D)."""
    return len(shape) >= 2 and not name.rsplit(".", 1)[-1].endswith(_NO_DECAY_ENDINGS)


def token_tables(model: nn.Module) -> set[int]:
    """Ids of parameters with a row for every token, or for every position of one: those of ``nn.Embedding`` and of the
    language head."""
    owners = (module for module in model.modules() if isinstance(module, nn.Embedding | LanguageHead))
    return {id(parameter) for module in owners for parameter in module.parameters()}


def tables(model: nn.Module) -> set[int]:
    """Ids of parameters whose rows are looked up or scored one by one, and which are no linear maps to Muon.

    They are the ``token_tables`` and those named ``*embedding``.
    """
    named = (parameter for name, parameter in model.named_parameters() if name.endswith(_TABLE_ENDING))
    return token_tables(model) | {id(parameter) for parameter in named}


def parameter_groups(model: nn.Module, components: Components, stage: StageConfig) -> list[dict[str, Any]]:
    """Groups of the trained parameters, in a fixed order.

    Each has a ``name``, its ``component``, ``state_kinds``: the names of what the optimizer keeps beside each master,
    value by value, and ``state_bits``: of each of those values.

    The learning rate starts at 0: it is written before every step, and an optimizer that is stepped by somebody else
    during construction (DeepSpeed does at stage 0 in bf16) must not move a weight.
    """
    owner = component_of_parameters(model, components)
    muon = isinstance(stage.optimizer, MuonConfig)
    beside = () if isinstance(stage.optimizer, AdafactorConfig) else ADAM_MOMENTS
    bits = stage.optimizer.state_bits if isinstance(stage.optimizer, AdamWConfig) else 32
    decay = stage.optimizer.weight_decay
    roles = {"matrices": (decay, MUON_MOMENTS), "decay": (decay, beside), "no_decay": (0.0, beside)}
    groups: dict[str, dict[str, Any]] = {}
    for component in sorted(set(owner.values())):
        for role, (weight_decay, kinds) in roles.items():
            name = f"{component}/{role}"
            groups[name] = {"params": [], "name": name, "component": component, "weight_decay": weight_decay, "lr": 0.0}
            groups[name] |= {"state_kinds": kinds, "state_bits": bits}
    no_matrices = tables(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = "decay" if decays(name, full_shape(parameter)) else "no_decay"
            role = "matrices" if muon and role == "decay" and id(parameter) not in no_matrices else role
            groups[f"{owner[name]}/{role}"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def schedule(stage: StageConfig, step: int, warmup: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of the stage after ``warmup`` steps, as a share of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    progress = min(1.0, (step + 1 - warmup) / max(1, stage.steps - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress
    return stage.min_learning_rate + (1 - stage.min_learning_rate) * fall


class LearningRates:
    """Learning rates of the trained components of a stage.

    Args:
        stage: The schedule, and peak and warm-up of each component.
        components: Those that the stage trains.
    """

    def __init__(self, stage: StageConfig, components: Iterable[str]) -> None:
        self._stage = stage
        self._peaks = {name: (stage.peak_learning_rate(name), stage.warmup(name)) for name in components}

    def at(self, step: int) -> dict[str, float]:
        """Return the learning rate of each component at ``step`` of the stage, from 0."""
        return {name: peak * schedule(self._stage, step, warmup) for name, (peak, warmup) in self._peaks.items()}


class Clips:
    """In front of an optimizer class: clips by the global norm and refuses a step whose norm is not finite.

    DeepSpeed's own wrappers do both from stage 1 on; at stage 0 in fp32 it would step with NaN gradients. The two
    public names without a meaning of their own are those under which DeepSpeed's engine looks for them.

    Attributes:
        clip: Largest norm; 0 for none.
        may_update: Called with the norm if it is finite; returns whether to step. It may scale the gradient.
    """

    clip = 0.0
    overflow = False
    may_update: Callable[[float], bool] | None = None
    _global_grad_norm = 0.0
    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clips, then steps."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(gradients)
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = norm
        if self.overflow or not (self.may_update is None or self.may_update(norm)):
            return
        if self.clip and norm > self.clip:
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        super().step(closure)  # type: ignore[misc]


def global_norm(tensors: list[Tensor]) -> float:
    """L2 norm of all values together."""
    if not tensors:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)), dtype=torch.float64))


def can_fuse(groups: list[dict[str, Any]]) -> bool:
    """Whether torch has one kernel for the whole step of these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
