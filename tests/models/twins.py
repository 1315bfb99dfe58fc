"""Copies weights from a Hugging Face twin by renaming, and measures distances to it through the same table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Reshape = Callable[[Tensor], Tensor]


def mapped(theirs: nn.Module, table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Parameters of the twin under our names; a name that no row matches is left out."""
    out = {}
    for name, parameter in theirs.named_parameters():
        for pattern, replacement in table:
            renamed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                out[renamed] = parameter
                break
    return out


def copy_weights(
    ours: nn.Module, theirs: nn.Module, table: list[tuple[str, str]], optional: str = "$^"
) -> dict[str, Tensor]:
    """Fills our model; every parameter of ours must be named, save those matching ``optional``."""
    source = mapped(theirs, table)
    for name, parameter in ours.named_parameters():
        if re.match(optional, name):
            continue
        with torch.no_grad():
            parameter.copy_(source[name].reshape(parameter.shape))
    return source


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Norm weights, biases and gates away from 0 and 1, where mistakes hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_scale else noise * (0.5 if parameter.numel() == 1 else 0.08))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of theirs."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def gradient_distance(ours: nn.Module, source: dict[str, Tensor]) -> float:
    """The largest distance of a parameter's gradient; both models must have run backward from the same loss.

    A gradient that is zero but for rounding, as that of a key's bias, is measured against a thousandth of the model's
    largest value.
    """
    pairs = [(parameter.grad, source[name].grad) for name, parameter in ours.named_parameters() if name in source]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    differences = [(float((mine - theirs.reshape(mine.shape)).abs().max()), theirs) for mine, theirs in pairs]
    return max(error / max(float(theirs.abs().max()), 1e-3 * largest) for error, theirs in differences)


def rounding_ratio(twins: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """How far ours in bfloat16 is from the truth, over how far theirs is: root mean squares, summed over twins.

    Args:
        twins: Of each seed: ours and theirs in bfloat16, and what float32 makes of the same rounded weights.
    """
    errors = [
        [float(((values.float() - truth).square().mean() / truth.square().mean()).sqrt()) for values in rounded]
        for *rounded, truth in twins
    ]
    mine, theirs = (sum(column) for column in zip(*errors, strict=True))
    return mine / theirs
