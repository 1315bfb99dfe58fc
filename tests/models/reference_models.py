"""Copies weights from a reference model under renamed parameters, and measures distances between both models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.families import pair

Reshape = Callable[[Tensor], Tensor]


def mapped(theirs: nn.Module, table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the reference model's parameters under our names, without those that no row of ``table`` matches."""
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
    """Copy the reference model's values into ours.

    The table must contain every parameter of ours, except those that match ``optional``. Returns
    ``mapped(theirs, table)``.
    """
    source = mapped(theirs, table)
    for name, parameter in ours.named_parameters():
        if re.match(optional, name):
            continue
        with torch.no_grad():
            parameter.copy_(source[name].reshape(parameter.shape))
    return source


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Set all parameters to random values with the spreads that the bounds of the parity tests were measured with."""
    pair.randomise(model, seed, spread=0.08, scale_spread=0.2)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute value of ``theirs``."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def gradient_distance(ours: nn.Module, source: dict[str, Tensor]) -> float:
    """Return the largest distance of a parameter's gradient. Both models must have run backward from the same loss.

    Each difference is relative to the parameter's largest gradient, but at least to a thousandth of the model's
    largest: some gradients, as those of key biases, are zero except for rounding.
    """
    pairs = [(parameter.grad, source[name].grad) for name, parameter in ours.named_parameters() if name in source]
    largest = max(float(theirs.abs().max()) for _, theirs in pairs)
    differences = [(float((mine - theirs.reshape(mine.shape)).abs().max()), theirs) for mine, theirs in pairs]
    return max(error / max(float(theirs.abs().max()), 1e-3 * largest) for error, theirs in differences)


def rounding_ratio(results: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the relative RMS error of our bfloat16 results over that of theirs, each summed over ``results``.

    Args:
        results: For each seed, our bfloat16 result, theirs, and the float32 result of the same rounded weights.
    """
    errors = [
        [float(((values.float() - truth).square().mean() / truth.square().mean()).sqrt()) for values in rounded]
        for *rounded, truth in results
    ]
    mine, theirs = (sum(column) for column in zip(*errors, strict=True))
    return mine / theirs
