"""Linear layer and cross-entropy in one, by chunks of rows, with the gradient computed on the way forward.

Logits of one chunk exist at a time, so memory is independent of the number of rows; nothing of size ``(T, V)`` is ever
made. Not for: sampling, or a second derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20
"""float32 logits of one chunk. At V = 131072 that is 128 rows, the size with the least memory at no loss of time."""


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits fill a chunk; eight times as many on CUDA, which needs larger matrices."""
    budget = CHUNK_BYTES * (8 if device.type == "cuda" else 1)
    return max(16, budget // (4 * vocab_size))


@dataclass(frozen=True)
class ZLoss:
    """Keeps the logits' normaliser near 1: ``coefficient * log(sum(exp(logits))) ** 2`` is added to each row's loss.

    Attributes:
        coefficient: Of the square.
        row_squares: float32 ``(T,)``, zeros; the weighted square of each row is written here, for reports.

    Source: PaLM (arXiv 2204.02311), section 5, "z loss".
    """

    coefficient: float
    row_squares: Tensor


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " T"],
    loss_weights: Float[Tensor, " T"],
    row_losses: Float[Tensor, " T"] | None = None,
    extra_weight: Float[Tensor, "N D"] | None = None,
    z_loss: ZLoss | None = None,
) -> Float[Tensor, ""]:
    """Sum over rows of ``loss_weights * cross_entropy(hidden @ weight.T, labels)``, in float32.

    Rows of weight 0 are skipped: their gradient is exactly zero and their label may be anything. Gradients reach
    ``hidden``, ``weight`` and ``extra_weight``, each only if it wants one; never ``loss_weights``.

    Args:
        hidden: Rows.
        weight: The head's matrix.
        labels: Ids.
        loss_weights: Weight of each row.
        row_losses: float32, zeros; the weighted cross-entropy of each row is written here, for reports.
        extra_weight: More rows of the matrix, of the ids from V on.
        z_loss: Added to the sum, weighted like the rest; None for none.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, fused linear cross-entropy.
    """
    rows = loss_weights.nonzero().squeeze(1)
    grad = torch.is_grad_enabled()
    weights = (weight,) if extra_weight is None else (weight, extra_weight)
    needs = tuple(grad and tensor.requires_grad for tensor in (hidden, *weights))
    chosen = hidden.index_select(0, rows), labels.index_select(0, rows), loss_weights.index_select(0, rows)
    losses = torch.zeros_like(chosen[2], dtype=torch.float32)
    squares = None if z_loss is None else torch.zeros_like(losses)
    coefficient = 0.0 if z_loss is None else z_loss.coefficient
    total = _LinearCrossEntropy.apply(*chosen, needs, losses, squares, coefficient, *weights)
    if row_losses is not None:
        row_losses.index_copy_(0, rows, losses)
    if z_loss is not None and squares is not None:
        z_loss.row_squares.index_copy_(0, rows, squares)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        needs: tuple[bool, ...],
        row_losses: Tensor,
        row_squares: Tensor | None,
        coefficient: float,
        *weights: Tensor,
    ) -> Tensor:
        hidden_grad = torch.empty_like(hidden) if needs[0] else None
        grads = [
            torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            for weight, wanted in zip(weights, needs[1:], strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counts = [weight.shape[0] for weight in weights]
        size = chunk_rows(sum(counts), hidden.device)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            rows, scale = hidden[part], loss_weights[part].float()
            logits = _joined([rows @ weight.t() for weight in weights]).float()  # (chunk, V)
            target = labels[part].unsqueeze(1)
            log_norm = logits.logsumexp(-1, keepdim=True)
            row_losses[part] = losses = (log_norm - logits.gather(1, target)).squeeze(1) * scale
            total += losses.sum()
            if row_squares is not None:
                row_squares[part] = squares = log_norm.squeeze(1).square() * scale
                total += coefficient * squares.sum()
            if not any(needs):
                continue
            slope = logits.sub_(log_norm).exp_()  # softmax, in the logits' own memory
            if row_squares is not None:
                slope.mul_(1 + 2 * coefficient * log_norm)
            slope.scatter_add_(1, target, slope.new_full(target.shape, -1.0))
            slopes = slope.mul_(scale.unsqueeze(1)).to(hidden.dtype).split(counts, dim=1)
            if hidden_grad is not None:
                torch.mm(slopes[0], weights[0], out=hidden_grad[part])
                for slope, weight in zip(slopes[1:], weights[1:], strict=True):
                    hidden_grad[part] += slope @ weight
            for grad, slope in zip(grads, slopes, strict=True):
                if grad is not None:
                    _add_product(grad, slope, rows)
        ctx.grads = (hidden_grad, grads)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("this loss was differentiated before: its gradients are kept for one backward only")
        hidden_grad, grads = ctx.grads
        ctx.grads = None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(slope)
        grads = [None if grad is None else grad.mul_(slope).to(ctx.dtype) for grad in grads]
        return hidden_grad, None, None, None, None, None, None, *grads


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left.T @ right`` with a float32 total, whatever the factors' dtype."""
    if left.dtype is torch.float32:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t() @ right)
