"""Weights that are freed after the forward pass and gathered again for the backward pass, as with ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mmscale.engine.graph import SavedWeights


class Part(nn.Module):
    """Saves a transposed weight, a slice of a weight, and a whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 6, 6))
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.mm(self.linear(rows).tanh(), self.experts[1]) * self.scale


def gathered_for_a_moment(part: Part, seen: list[StorageWeakRef], padding: int = 0) -> None:
    """Hooks that gather weights before a pass, with some values behind them, and free them after it."""
    kept = {p: p.detach().clone() for p in part.parameters()}

    def gather(*_: Any) -> None:
        for parameter, values in kept.items():
            parameter.ds_numel_aligned = values.numel() + padding  # type: ignore[attr-defined]
            buffer = values.new_zeros(values.numel() + padding)
            parameter.data = buffer[: values.numel()].view(values.shape).copy_(values)

    def release(*_: Any) -> None:
        for parameter in kept:
            seen.append(StorageWeakRef(parameter.untyped_storage()))
            parameter.data = torch.empty(0)

    part.register_forward_pre_hook(gather)
    part.register_forward_hook(release)
    part.register_full_backward_pre_hook(gather)


def passes(
    whole: bool, saving: Callable[[nn.Module], AbstractContextManager[Any]], padding: int = 0
) -> tuple[list[bool], list[Tensor]]:
    """Return which gathered storages are freed after the forward pass, and the gradients."""
    torch.manual_seed(1)
    part, rows, seen = Part(), torch.randn(5, 6, requires_grad=True), []
    if not whole:
        gathered_for_a_moment(part, seen, padding)
    with saving(part):
        out = part(rows)
    gone = [storage.expired() for storage in seen]
    grads = torch.autograd.grad(out.square().sum(), [rows, *part.parameters()])
    return gone, list(grads)


@pytest.mark.parametrize(("as_unit", "padding"), [(True, 0), (False, 0), (True, 2)])
def test_freed_weights_are_gone_and_gradients_are_those_of_whole_ones(as_unit: bool, padding: int) -> None:
    def saving(part: nn.Module) -> AbstractContextManager[Any]:
        return SavedWeights(part, [part] if as_unit else [])()

    _, expected = passes(True, lambda part: nullcontext())
    kept, _ = passes(False, lambda part: nullcontext())
    gone, grads = passes(False, saving, padding)
    assert not all(kept), "autograd alone holds on to the views"
    assert all(gone)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_an_address_that_serves_again_is_not_taken_for_the_weight() -> None:
    part = Part()
    saved = SavedWeights(part, [part])
    values = part.scale.detach()
    with saved():
        part(torch.zeros(1, 6))  # Records the addresses.
        part.scale.data = torch.empty(0)
        factor = values.requires_grad_()  # An activation in the memory of a freed weight.
        out = factor * factor.detach()
    assert torch.equal(torch.autograd.grad(out.sum(), factor)[0], factor.detach())
