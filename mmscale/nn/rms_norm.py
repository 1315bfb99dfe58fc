"""Root mean square norm with a backward pass of its own on a CPU.

There torch differentiates it operation by operation. Forward and backward pass of 2,048 rows of width 192 then take 9.0
ms of CPU time. With this function they take 4.9 ms. Both are medians of 40 on one thread of a 2-core Intel Xeon with
AMX, beside other work. On CUDA torch has a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class RmsNorm(nn.RMSNorm):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in at least float32.

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization".
    """

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        if x.is_cuda or self.eps is None:
            return super().forward(x)
        if not torch.is_grad_enabled():
            return _normed(x, self.weight, self.eps)[0]
        normed: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
        return normed


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the output, and the factor of each row."""
    wide = _wide(x)
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = _wide(x) * scale, _wide(grad)
        d_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        grad = grad * weight
        shared = torch.linalg.vecdot(grad, normed).div_(x.shape[-1]).unsqueeze(-1)
        return grad.sub_(normed.mul_(shared)).mul_(scale).to(x.dtype), d_weight, None


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
