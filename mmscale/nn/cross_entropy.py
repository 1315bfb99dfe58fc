"""Linear layer and cross-entropy in one, by chunks of rows, with the gradient computed on the way forward.

Logits of one chunk exist at a time, so memory is independent of the number of rows; nothing of size ``(T, V)`` is ever
made. What else the logits are to do, keep their normaliser small or follow another model's, is asked of the same chunk.
Not for: sampling, or a second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


@dataclass(frozen=True)
class SoftTarget:
    """A teacher's distribution over the same ids, as the rows before its head; its logits too exist a chunk at a time.

    Each row's loss is the Kullback-Leibler divergence ``sum(p * log(p / q))`` of the student's ``q = softmax(logits /
    temperature)`` from the teacher's ``p``, times ``share * temperature**2``. Gradients fall with that square; with it,
    shares mean the same at every temperature.

    Attributes:
        hidden: ``(T, D of the teacher)``; no gradient reaches it.
        weights: The head's matrix and, of one with extra ids, that of their rows: together V rows.
        share: Of the loss; what the shares of all teachers leave of 1 is the cross-entropy's.
        temperature: Of both distributions.
        row_losses: float32 ``(T,)``, zeros; the weighted divergence of each row is written here, for reports.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2 and 2.1.
    """

    hidden: Tensor
    weights: tuple[Tensor, ...]
    share: float
    temperature: float
    row_losses: Tensor

    @property
    def scale(self) -> float:
        """What a divergence is multiplied with in the loss."""
        return self.share * self.temperature**2

    def pull(self, logits: Tensor, rows: Tensor, loss_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a chunk, and of each of its rows, unweighted, the derivative by the logits ``(n, V)``."""
        theirs = _logits(self.hidden.index_select(0, rows), self.weights)
        wanted = theirs.div_(self.temperature).log_softmax(-1)
        ours = logits.div(self.temperature).log_softmax(-1)
        losses = F.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1) * loss_weights
        self.row_losses.index_copy_(0, rows, losses.to(self.row_losses.dtype))
        slope = ours.exp_().sub_(wanted.exp_()).mul_(self.share * self.temperature)
        return self.scale * losses.sum(), slope


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " T"],
    loss_weights: Float[Tensor, " T"],
    row_losses: Float[Tensor, " T"] | None = None,
    extra_weight: Float[Tensor, "N D"] | None = None,
    z_loss: ZLoss | None = None,
    soft_targets: Sequence[SoftTarget] = (),
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
        soft_targets: Teachers, whose divergences take their shares of the sum from the cross-entropy.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, fused linear cross-entropy.
    """
    rows = loss_weights.nonzero().squeeze(1)
    grad = torch.is_grad_enabled()
    weights = (weight,) if extra_weight is None else (weight, extra_weight)
    needs = tuple(grad and tensor.requires_grad for tensor in (hidden, *weights))
    scale = loss_weights.index_select(0, rows).float()
    losses = torch.zeros_like(scale)
    squares = None if z_loss is None else torch.zeros_like(losses)
    coefficient = 0.0 if z_loss is None else z_loss.coefficient
    asked = _Asked(labels.index_select(0, rows), scale, rows, losses, squares, coefficient, tuple(soft_targets))
    total: Tensor = _LinearCrossEntropy.apply(hidden.index_select(0, rows), asked, needs, *weights)
    if row_losses is not None:
        row_losses.index_copy_(0, rows, losses)
    if z_loss is not None and squares is not None:
        z_loss.row_squares.index_copy_(0, rows, squares)
    return total


@dataclass(frozen=True)
class _Asked:
    """What is asked of the logits of the rows that carry weight, and where the answers of each row are written.

    Attributes:
        rows: Their numbers among all rows, by which teachers know them.
        squares: None without a z loss.
    """

    labels: Tensor
    loss_weights: Tensor
    rows: Tensor
    losses: Tensor
    squares: Tensor | None
    coefficient: float
    soft: tuple[SoftTarget, ...]

    def add(self, total: Tensor, logits: Tensor, part: slice, *, sloped: bool) -> Tensor | None:
        """Adds the loss of a chunk to ``total``; its derivative by the logits, whose memory it takes, if asked for."""
        target, scale = self.labels[part].unsqueeze(1), self.loss_weights[part]
        hard = max(0.0, 1.0 - math.fsum(each.share for each in self.soft))  # What teachers leave to the cross-entropy.
        pulls = [each.pull(logits, self.rows[part], scale) for each in self.soft]
        peak, right = logits.amax(-1, keepdim=True), logits.gather(1, target)
        slope = logits.sub_(peak).exp_()  # In the logits' own memory.
        norm = slope.sum(-1, keepdim=True)
        # The peak is subtracted from the label's logit first: near a loss of zero both are equal and large.
        self.losses[part] = losses = ((peak - right) + norm.log()).squeeze(1) * scale
        total += hard * losses.sum()
        log_norm = peak + norm.log()
        if self.squares is not None:
            self.squares[part] = squares = log_norm.squeeze(1).square() * scale
            total += self.coefficient * squares.sum()
        for loss, _ in pulls:
            total += loss
        if not sloped:
            return None
        slope.div_(norm)
        if self.squares is not None or self.soft:
            slope.mul_(hard + 2 * self.coefficient * log_norm)
        slope.scatter_add_(1, target, slope.new_full(target.shape, -hard))
        for _, pull in pulls:
            slope += pull
        return slope.mul_(scale.unsqueeze(1))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, asked: _Asked, needs: tuple[bool, ...], *weights: Tensor) -> Tensor:
        hidden_grad = torch.empty_like(hidden) if needs[0] else None
        grads = [
            torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            for weight, wanted in zip(weights, needs[1:], strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counts = [weight.shape[0] for weight in weights]
        # A teacher needs four more tensors of a chunk's size: both distributions, their divergence, its derivative.
        size = chunk_rows(sum(counts) * (4 if asked.soft else 1), hidden.device)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            rows = hidden[part]
            slope = asked.add(total, _logits(rows, weights), part, sloped=any(needs))
            if slope is None:
                continue
            slopes = slope.to(hidden.dtype).split(counts, dim=1)
            if hidden_grad is not None:
                torch.mm(slopes[0], weights[0], out=hidden_grad[part])
                for slope, weight in zip(slopes[1:], weights[1:], strict=True):
                    hidden_grad[part] += slope @ weight
            for grad, slope in zip(grads, slopes, strict=True):
                if grad is None:
                    continue
                if slope.dtype is torch.float32:
                    grad.addmm_(slope.t(), rows)
                else:  # addmm_ takes one dtype, and the sum over chunks is float32.
                    grad.add_(slope.t() @ rows)
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
        return hidden_grad, None, None, *grads


def _logits(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """float32 ``(rows, V)``."""
    parts = [rows @ weight.t() for weight in weights]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float()
