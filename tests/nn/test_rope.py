"""The rotation against multiplication by complex numbers, and its gradient against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmscale.nn.rope import Rotation, rotate


@pytest.mark.parametrize("unrotated", [0, 2])
def test_values_and_gradients_are_those_of_complex_numbers(unrotated: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(5, 3, dtype=torch.float64)
    rotation = Rotation.from_angles(angles, torch.float64)
    heads = torch.randn(2, 5, 6 + unrotated, dtype=torch.float64).transpose(0, 1).requires_grad_()  # Not contiguous.
    first, second, rest = heads.split([3, 3, unrotated], dim=-1)
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    expected = torch.cat([product.real, product.imag, rest], dim=-1)
    torch.testing.assert_close(rotate(heads, rotation), expected, rtol=1e-12, atol=1e-12)

    def call(values: Tensor) -> Tensor:
        return rotate(values, rotation)

    assert torch.autograd.gradcheck(call, (heads,))
