"""Copies weights from a Hugging Face twin by renaming, and compares gradients through the same table."""

from __future__ import annotations

import re
from collections.abc import Callable

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


def assert_same_grads(ours: nn.Module, source: dict[str, Tensor], atol: float) -> None:
    """Both models must have run backward from the same loss."""
    compared = 0
    for name, parameter in ours.named_parameters():
        if name in source:
            theirs = source[name].grad
            assert parameter.grad is not None, name
            assert theirs is not None, name
            torch.testing.assert_close(parameter.grad, theirs.reshape(parameter.shape), atol=atol, rtol=1e-4, msg=name)
            compared += 1
    assert compared
