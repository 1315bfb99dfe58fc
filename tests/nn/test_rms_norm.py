"""The norm's own backward pass against differences of the formula, and against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmscale.nn.rms_norm import RmsNorm


def build(dim: int, dtype: torch.dtype) -> RmsNorm:
    torch.manual_seed(0)
    norm = RmsNorm(dim, eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def test_values_and_gradients_are_those_of_the_formula() -> None:
    norm = build(6, torch.float64)
    rows = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    expected = norm.weight * rows / (rows.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(rows), expected, rtol=1e-12, atol=0)

    def call(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (rows,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, (rows, norm.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_rounds_as_torch_does(dtype: torch.dtype, frozen: bool) -> None:
    norm, theirs = build(24, dtype).requires_grad_(not frozen), nn.RMSNorm(24, eps=1e-3).to(dtype)
    theirs.load_state_dict(norm.state_dict())
    direction = torch.randn(24, 40).to(dtype).T  # Not contiguous.
    rows, copy = (torch.linspace(-3, 5, 960).view(40, 24).to(dtype).requires_grad_() for _ in range(2))
    ours, reference = norm(rows), theirs(copy)
    ours.backward(direction)
    reference.backward(direction)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(rows.grad, copy.grad)
    if frozen:
        assert norm.weight.grad is None
    else:
        torch.testing.assert_close(norm.weight.grad, theirs.weight.grad)
