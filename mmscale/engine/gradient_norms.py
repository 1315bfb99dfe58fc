"""Gradient norms of each component, between the backward pass and the optimizer's step.

    this rank's part of the averaged gradient --squares by component--> (sum over ranks) --root--> norm before clipping

This takes one pass over the gradient. It runs on the steps that report these norms, and on all steps if each component
is clipped by its own norm (``Engine._update`` scales). Not for: clipping by the norm of the whole gradient, which
DeepSpeed computes and applies, except at stage 0 in fp32 (``optim.schedule.ClippingMixin``).

DeepSpeed's public interface gathers the gradient of one parameter at a time, in one message each. This module reads the
private attributes of DeepSpeed 0.19. Stages 1 to 3 hold a list of tensors for each optimizer group. With an offloaded
optimizer, and at stage 1 in bf16, they hold one flat tensor for each group. Stage 0 holds the parameters' ``grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World


def square_sums(
    model: nn.Module, owner: Mapping[str, str], components: Iterable[str], optimizer: Any, zero_stage: int, world: World
) -> dict[str, float]:
    """Return this rank's part of each component's squared gradient norm. The sum over ranks is the squared norm.

    Args:
        model: The bare model.
        owner: Component of each parameter, by parameter name.
        components: The trained components; each gets an entry on every rank, in this order.
        optimizer: DeepSpeed's wrapper of the optimizer, or at stage 0 in fp32 the optimizer.
        zero_stage: 0-3.
        world: This rank.
    """
    squares = dict.fromkeys(components, 0.0)
    held = _replicated(model, owner, world) if zero_stage == 0 else _partitioned(optimizer, zero_stage)
    for component, gradients in held:
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
            squares[component] += float(norms.double().square().sum())
    scale = float(getattr(optimizer, "loss_scale", 1.0) or 1.0)
    return {component: value / scale**2 for component, value in squares.items()}


def _replicated(model: nn.Module, owner: Mapping[str, str], world: World) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the gradients at stage 0. Every rank holds the whole gradient, so only rank 0 counts it."""
    if not world.is_main:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            yield owner[name], [parameter.grad]


def _partitioned(optimizer: Any, zero_stage: int) -> Iterator[tuple[str, list[Tensor]]]:
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
