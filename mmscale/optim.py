"""Optimizer groups, schedules, and the optimizer itself.

Groups are known by name, ``component/decay`` or ``component/no_decay``, never by index: DeepSpeed drops empty groups
and shifts the indices of the rest. A schedule is a pure function of the step within the stage; it has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.errors import ConfigError
from mmscale.stages import ALL, DEFAULT, StageConfig

_NO_DECAY_ENDINGS = ("bias", "gate")


def component_of_parameters(model: nn.Module, components: Mapping[str, Sequence[nn.Module]]) -> dict[str, str]:
    """The component of every parameter, by parameter name.

    Raises:
        ConfigError: a parameter belongs to no component, or to two.
    """
    owner: dict[int, str] = {}
    for component, modules in components.items():
        for parameter in (p for module in modules for p in module.parameters()):
            if owner.setdefault(id(parameter), component) != component:
                raise ConfigError(f"a parameter belongs to the components {owner[id(parameter)]} and {component}")
    orphans = [name for name, parameter in model.named_parameters() if id(parameter) not in owner]
    if orphans:
        raise ConfigError(f"parameters that belong to no component: {orphans[:5]}; components() must cover the model")
    return {name: owner[id(parameter)] for name, parameter in model.named_parameters()}


def trained_components(components: Iterable[str], stage: StageConfig) -> tuple[str, ...]:
    """The components that ``stage`` trains, of those that the model has.

    Raises:
        ConfigError: the stage names a component that the model lacks, in ``train`` or in ``learning_rate``.
    """
    present = sorted(components)
    wanted = present if stage.train == (ALL,) else stage.train
    missing = (set(wanted) | set(stage.learning_rate)) - set(present) - {DEFAULT}
    if missing:
        raise ConfigError(f"stage {stage.name}: the model has no component {sorted(missing)}; it has {present}")
    return tuple(wanted)


def freeze(model: nn.Module, components: Mapping[str, Sequence[nn.Module]], stage: StageConfig) -> None:
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


def parameter_groups(
    model: nn.Module, components: Mapping[str, Sequence[nn.Module]], stage: StageConfig
) -> list[dict[str, Any]]:
    """Groups of the trained parameters, in a fixed order, with ``name`` and ``component`` in each.

    The learning rate starts at 0: it is written before every step, and an optimizer that is stepped by somebody else
    during construction (DeepSpeed does at stage 0 in bf16) must not move a weight.
    """
    owner = component_of_parameters(model, components)
    groups: dict[str, dict[str, Any]] = {}
    for component in sorted(set(owner.values())):
        for kind, decay in (("decay", stage.weight_decay), ("no_decay", 0.0)):
            name = f"{component}/{kind}"
            groups[name] = {"params": [], "name": name, "component": component, "weight_decay": decay, "lr": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "decay" if decays(name, full_shape(parameter)) else "no_decay"
            groups[f"{owner[name]}/{kind}"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def schedule(stage: StageConfig, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of the stage, as a share of the peak."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    progress = min(1.0, (step + 1 - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress
    return stage.min_learning_rate + (1 - stage.min_learning_rate) * fall


def learning_rates(stage: StageConfig, components: Iterable[str], step: int) -> dict[str, float]:
    """Learning rate of each of the trained ``components`` at ``step`` of the stage."""
    share = schedule(stage, step)
    return {component: stage.peak_learning_rate(component) * share for component in components}


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and refuses a step whose norm is not finite.

    DeepSpeed's own wrappers do both from stage 1 on; at stage 0 in fp32 it would step with NaN gradients. The two
    attributes have the names under which DeepSpeed's engine looks for them.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=0.0, betas=betas, eps=eps, fused=_can_fuse(groups))
        self.clip = clip
        self.overflow = False
        self.refuses: Callable[[float], bool] | None = None
        self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(gradients)
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = norm
        if self.overflow or (self.refuses is not None and self.refuses(norm)):
            return
        if self.clip and norm > self.clip:
            torch._foreach_mul_(gradients, self.clip / (norm + 1e-6))
        super().step(closure)


def global_norm(tensors: list[Tensor]) -> float:
    """L2 norm of all values together."""
    if not tensors:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)), dtype=torch.float64))


def build_adamw(groups: list[dict[str, Any]], stage: StageConfig, *, clip_here: bool) -> torch.optim.AdamW:
    """AdamW over ``groups``; with ``clip_here`` it clips and checks by itself."""
    if clip_here:
        return ClippedAdamW(groups, clip=stage.clip, betas=stage.betas, eps=stage.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=stage.betas, eps=stage.eps, fused=_can_fuse(groups))


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
