"""Parameter groups, learning rate schedules, and gradient clipping for the case without a DeepSpeed wrapper.

Groups are identified by name (``component/decay``, ``component/no_decay`` and for Muon ``component/matrices``), not by
index, because DeepSpeed drops empty groups and shifts the indices. A schedule is a pure function of the step within the
stage and has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.errors import ConfigError
from mmscale.models.image_tokens import TOKENIZER, ImageHead
from mmscale.models.vocabulary import LanguageHead
from mmscale.nn.expert_parallel import full_shape
from mmscale.nn.init import fixed_parameters
from mmscale.optim.config import AdafactorConfig, AdamWConfig, MuonConfig
from mmscale.optim.stages import ALL, StageConfig

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
_NO_DECAY_ENDINGS = ("bias", "gate")
_TABLE_ENDING = "embedding"


Components = Mapping[str, Sequence[nn.Parameter]]
"""Parameters by the name of their component, as a model's ``components()`` returns them."""


def component_of_parameters(model: nn.Module, components: Components) -> dict[str, str]:
    """Return the component of every parameter, by parameter name.

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
    """Return the components that ``stage`` trains.

    ``all`` leaves out the image tokenizer of a model that draws.

    Raises:
        ConfigError: the stage names a component that the model lacks.
    """
    present = sorted(components)
    wanted = [name for name in present if name != TOKENIZER] if stage.train == (ALL,) else stage.train
    missing = (set(wanted) | stage.named_components) - set(present)
    if missing:
        raise ConfigError(f"stage {stage.name}: the model has no component {sorted(missing)}; it has {present}")
    return tuple(wanted)


def freeze(model: nn.Module, components: Components, stage: StageConfig) -> None:
    """Set ``requires_grad`` of every parameter: True for the components that ``stage`` trains, False for the others.

    ``fixed_parameters`` stay frozen in a trained component, too.

    Raises:
        ConfigError: the stage names a component that the model lacks, or a parameter does not belong to exactly one
            component.
    """
    names = trained_components(components, stage)
    owner = component_of_parameters(model, components)
    fixed = fixed_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(owner[name] in names and id(parameter) not in fixed)


def decays(name: str, shape: Sequence[int]) -> bool:
    """Return whether weight decay applies: to matrices, but not to norms, biases and gates.

    The name decides too, because the stacked biases of experts have two dimensions.
    """
    return len(shape) >= 2 and not name.rsplit(".", 1)[-1].endswith(_NO_DECAY_ENDINGS)


def token_tables(model: nn.Module) -> set[int]:
    """Return the ``id()`` of each parameter with one row per token or per position.

    They are the parameters of ``nn.Embedding`` and of the heads, without those of layers in them.
    """
    owners = (module for module in model.modules() if isinstance(module, nn.Embedding | LanguageHead | ImageHead))
    return {id(parameter) for module in owners for parameter in module.parameters(recurse=False)}


def tables(model: nn.Module) -> set[int]:
    """Return the ``id()`` of each parameter that is a table of vectors, which Muon must not treat as a linear map.

    They are the ``token_tables`` and the parameters whose names end in ``embedding``.
    """
    named = (parameter for name, parameter in model.named_parameters() if name.endswith(_TABLE_ENDING))
    return token_tables(model) | {id(parameter) for parameter in named}


def parameter_groups(model: nn.Module, components: Components, stage: StageConfig) -> list[dict[str, Any]]:
    """Return the groups of the trained parameters in a fixed order, without empty ones.

    Besides torch's keys, each group has a ``name``, its ``component``, ``state_kinds`` (names of the optimizer's state
    tensors with one value per parameter value) and ``state_bits`` (bits of each of these values).

    The learning rate is 0 at first and must be set before every step. DeepSpeed steps the optimizer while it is being
    constructed (at stage 0 in bf16), which must not change a weight.
    """
    owner = component_of_parameters(model, components)
    muon = isinstance(stage.optimizer, MuonConfig)
    moments = () if isinstance(stage.optimizer, AdafactorConfig) else ADAM_MOMENTS
    bits = stage.optimizer.state_bits if isinstance(stage.optimizer, AdamWConfig) else 32
    decay = stage.optimizer.weight_decay
    roles = {"matrices": (decay, MUON_MOMENTS), "decay": (decay, moments), "no_decay": (0.0, moments)}
    groups: dict[str, dict[str, Any]] = {}
    for component in sorted(set(owner.values())):
        for role, (weight_decay, kinds) in roles.items():
            name = f"{component}/{role}"
            groups[name] = {"params": [], "name": name, "component": component, "weight_decay": weight_decay, "lr": 0.0}
            groups[name] |= {"state_kinds": kinds, "state_bits": bits}
    table_ids = tables(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = "decay" if decays(name, full_shape(parameter)) else "no_decay"
            role = "matrices" if muon and role == "decay" and id(parameter) not in table_ids else role
            groups[f"{owner[name]}/{role}"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def schedule(stage: StageConfig, step: int, warmup: int) -> float:
    """Return the learning rate of 0-based optimizer step ``step`` of the stage, as a share of the peak.

    It rises linearly for ``warmup`` steps and then follows ``stage.schedule``.
    """
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    progress = min(1.0, (step + 1 - warmup) / max(1, stage.steps - warmup))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress
    return stage.min_learning_rate + (1 - stage.min_learning_rate) * decay


class LearningRates:
    """Learning rates of the trained components of a stage.

    Args:
        stage: Schedule, and peak and warm-up of each component.
        components: Components that the stage trains.
    """

    def __init__(self, stage: StageConfig, components: Iterable[str]) -> None:
        self._stage = stage
        self._peaks = {name: (stage.peak_learning_rate(name), stage.warmup(name)) for name in components}

    def at(self, step: int) -> dict[str, float]:
        """Return the learning rate of each component at the 0-based ``step`` of the stage."""
        return {name: peak * schedule(self._stage, step, warmup) for name, (peak, warmup) in self._peaks.items()}


class ClippingMixin:
    """Clips gradients by their global norm, and skips a step whose norm is not finite.

    A subclass lists this mixin before the optimizer class. DeepSpeed's own wrappers do both from stage 1 on. At stage 0
    in fp32 there is no wrapper, and DeepSpeed would step with NaN gradients. DeepSpeed's engine reads ``overflow`` and
    ``_global_grad_norm`` of an optimizer.

    Attributes:
        clip: Largest global norm; 0 for no clipping.
        overflow: Whether the last step was skipped because its norm was not finite.
        may_update: Called with the norm if it is finite; returns whether to step. It may scale the gradient in place.
    """

    clip = 0.0
    overflow = False
    may_update: Callable[[float], bool] | None = None
    _global_grad_norm = 0.0
    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clip, then step; leave the weights alone if the norm is not finite or ``may_update`` returns False."""
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
    """Return the L2 norm of all values of ``tensors`` together."""
    if not tensors:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)), dtype=torch.float64))


def can_fuse(groups: list[dict[str, Any]]) -> bool:
    """Return whether torch's fused optimizer step supports these parameters."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
