"""Fused linear layer and cross-entropy: computes the loss and its gradients chunk by chunk in the forward pass.

Only one chunk of logits exists at a time, so the memory for logits does not grow with the number of rows. The z loss
and the distillation terms are computed from the same chunk. Not for sampling, and no second derivatives.
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
"""Memory of the float32 logits of one chunk on the CPU. At V = 131072 that is 128 rows; smaller chunks are slower."""


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Return how many rows of float32 logits fit in a chunk, at least 16.

    A chunk is eight times larger on CUDA, because GPUs need larger matrices to be efficient.
    """
    budget = CHUNK_BYTES * (8 if device.type == "cuda" else 1)
    return max(16, budget // (4 * vocab_size))


@dataclass(frozen=True)
class ZLoss:
    """A penalty that keeps ``log(sum(exp(logits)))`` near 0.

    Each row adds ``loss_weight * coefficient * log(sum(exp(logits))) ** 2`` to the loss.

    Attributes:
        coefficient: Factor of the penalty.
        row_squares: float32 ``(T,)``, zeros. ``linear_cross_entropy`` writes ``loss_weight * logsumexp ** 2`` of each
            row here, without the coefficient. For metrics; carries no gradient.

    Source: PaLM (arXiv 2204.02311), section 5, "z loss".
    """

    coefficient: float
    row_squares: Tensor


@dataclass(frozen=True)
class SoftTarget:
    """A teacher's prediction for each row, given as its hidden rows and its head; logits are computed chunk by chunk.

    Each row adds ``loss_weight * share * temperature**2 * KL(p || q)`` to the loss. ``p`` is the teacher's and ``q``
    the student's ``softmax(logits / temperature)``. Gradients of the divergence shrink with ``1 / temperature**2``; the
    factor makes a share weigh about the same at every temperature.

    Attributes:
        hidden: ``(T, D of the teacher)``; receives no gradient.
        weights: The teacher's head matrix, and that of its extra ids if it has any. The rows must add up to the
            student's number of logits.
        share: Weight of this term. The cross-entropy has the weight ``1 - sum(shares of all teachers)``.
        temperature: Divides the logits of teacher and student.
        row_losses: float32 ``(T,)``, zeros. ``linear_cross_entropy`` writes ``loss_weight * KL(p || q)`` of each row
            here, without the factors. For metrics; carries no gradient.

    Source: Hinton et al. 2015 (arXiv 1503.02531), sections 2 and 2.1.
    """

    hidden: Tensor
    weights: tuple[Tensor, ...]
    share: float
    temperature: float
    row_losses: Tensor

    @property
    def scale(self) -> float:
        """Factor of the divergence in the loss."""
        return self.share * self.temperature**2

    def distillation_term(self, logits: Tensor, rows: Tensor, loss_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a chunk of n rows and its gradient with respect to the logits. Write ``row_losses``.

        Args:
            logits: The student's, ``(n, V)``.
            rows: Indices of the chunk's rows in ``hidden``.
            loss_weights: Weight of each row. The loss includes it; the gradient ``(n, V)`` does not.
        """
        theirs = _logits(self.hidden.index_select(0, rows), self.weights)
        target = theirs.div_(self.temperature).log_softmax(-1)
        ours = logits.div(self.temperature).log_softmax(-1)
        losses = F.kl_div(ours, target, reduction="none", log_target=True).sum(-1) * loss_weights
        self.row_losses.index_copy_(0, rows, losses.to(self.row_losses.dtype))
        gradient = ours.exp_().sub_(target.exp_()).mul_(self.share * self.temperature)
        return self.scale * losses.sum(), gradient


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " T"],
    loss_weights: Float[Tensor, " T"],
    row_losses: Float[Tensor, " T"] | None = None,
    extra_weight: Float[Tensor, "N D"] | None = None,
    z_loss: ZLoss | None = None,
    soft_targets: Sequence[SoftTarget] = (),
    rows: Int[Tensor, " L"] | None = None,
) -> Float[Tensor, ""]:
    """Return the float32 sum over rows of ``loss_weights * cross_entropy(hidden @ weight.T, labels)``.

    Rows with weight 0 are skipped: their gradient is exactly zero, and their labels are not read. ``hidden``,
    ``weight`` and ``extra_weight`` receive gradients if they require them; ``loss_weights`` does not. The forward pass
    computes the gradients, so the result supports one backward pass; a second one raises ``RuntimeError``.

    Args:
        hidden: Rows before the head.
        weight: The head's matrix.
        labels: Token ids.
        loss_weights: Weight of each row.
        row_losses: float32, zeros. Receives the weighted cross-entropy of each row, before teachers take their share.
            For metrics; carries no gradient.
        extra_weight: Further rows of the matrix, for ids V, V + 1, ...
        z_loss: Penalty on the logits' normaliser, weighted by ``loss_weights``; None for none.
        soft_targets: Teachers. Each adds its divergence with its share; the cross-entropy keeps the remaining share.
        rows: Indices of the rows to compute, ascending. They must contain every row with a weight. None: the function
            finds them, for which the host waits for the device.

    Raises:
        ValueError: a row outside of ``rows`` has a weight. Checked on the CPU only, where it costs no wait.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, fused linear cross-entropy.
    """
    if rows is None:
        rows = loss_weights.nonzero().squeeze(1)
    grad = torch.is_grad_enabled()
    weights = (weight,) if extra_weight is None else (weight, extra_weight)
    needs = tuple(grad and tensor.requires_grad for tensor in (hidden, *weights))
    scale = loss_weights.index_select(0, rows).float()
    if scale.device.type == "cpu" and scale.count_nonzero() != loss_weights.count_nonzero():
        raise ValueError(
            f"loss_weights has weights outside of the {len(rows)} rows that are given as those with weights"
        )
    losses = torch.zeros_like(scale)
    squares = None if z_loss is None else torch.zeros_like(losses)
    coefficient = 0.0 if z_loss is None else z_loss.coefficient
    request = _LossRequest(labels.index_select(0, rows), scale, rows, losses, squares, coefficient, tuple(soft_targets))
    total: Tensor = _LinearCrossEntropy.apply(hidden.index_select(0, rows), request, needs, *weights)
    if row_losses is not None:
        row_losses.index_copy_(0, rows, losses)
    if z_loss is not None and squares is not None:
        z_loss.row_squares.index_copy_(0, rows, squares)
    return total


@dataclass(frozen=True)
class _LossRequest:
    """The loss to compute for the rows with weight, and the buffers that receive each row's terms.

    Attributes:
        labels: Token id of each row.
        loss_weights: Weight of each row.
        rows: Index of each row in the tensors of all T rows, for the teachers.
        losses: Buffer for the weighted cross-entropy of each row.
        squares: Buffer for the weighted squares of the z loss; None without a z loss.
        coefficient: Factor of the z loss.
        soft: Teachers.
    """

    labels: Tensor
    loss_weights: Tensor
    rows: Tensor
    losses: Tensor
    squares: Tensor | None
    coefficient: float
    soft: tuple[SoftTarget, ...]

    def add_chunk(self, total: Tensor, logits: Tensor, part: slice, *, with_gradient: bool) -> Tensor | None:
        """Add the loss of the rows ``part`` to ``total`` in place.

        Returns:
            The gradient with respect to the logits, or None without ``with_gradient``. Both cases overwrite ``logits``.
        """
        target, scale = self.labels[part].unsqueeze(1), self.loss_weights[part]
        hard = max(0.0, 1.0 - math.fsum(each.share for each in self.soft))  # Share of the cross-entropy.
        terms = [each.distillation_term(logits, self.rows[part], scale) for each in self.soft]
        peak, label_logit = logits.amax(-1, keepdim=True), logits.gather(1, target)
        gradient = logits.sub_(peak).exp_()  # Reuses the memory of the logits.
        norm = gradient.sum(-1, keepdim=True)
        # Subtract the label's logit from the peak first: when the loss is near 0, both are large and nearly equal.
        self.losses[part] = losses = ((peak - label_logit) + norm.log()).squeeze(1) * scale
        total += hard * losses.sum()
        log_norm = peak + norm.log()
        if self.squares is not None:
            self.squares[part] = squares = log_norm.squeeze(1).square() * scale
            total += self.coefficient * squares.sum()
        for loss, _ in terms:
            total += loss
        if not with_gradient:
            return None
        gradient.div_(norm)
        if self.squares is not None or self.soft:
            gradient.mul_(hard + 2 * self.coefficient * log_norm)
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -hard))
        for _, term_gradient in terms:
            gradient += term_gradient
        return gradient.mul_(scale.unsqueeze(1))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, request: _LossRequest, needs: tuple[bool, ...], *weights: Tensor) -> Tensor:
        hidden_grad = torch.empty_like(hidden) if needs[0] else None
        grads = [
            torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            for weight, wanted in zip(weights, needs[1:], strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        counts = [weight.shape[0] for weight in weights]
        # A teacher needs four more tensors of the chunk's size: two distributions, the divergence, its gradient.
        size = chunk_rows(sum(counts) * (4 if request.soft else 1), hidden.device)
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            rows = hidden[part]
            logits_grad = request.add_chunk(total, _logits(rows, weights), part, with_gradient=any(needs))
            if logits_grad is None:
                continue
            logits_grads = logits_grad.to(hidden.dtype).split(counts, dim=1)
            if hidden_grad is not None:
                torch.mm(logits_grads[0], weights[0], out=hidden_grad[part])
                for logits_grad, weight in zip(logits_grads[1:], weights[1:], strict=True):
                    hidden_grad[part] += logits_grad @ weight
            for grad, logits_grad in zip(grads, logits_grads, strict=True):
                if grad is None:
                    continue
                if logits_grad.dtype is torch.float32:
                    grad.addmm_(logits_grad.t(), rows)
                else:  # addmm_ needs one dtype for all operands, but the sum over chunks must be float32.
                    grad.add_(logits_grad.t() @ rows)
        ctx.grads = (hidden_grad, grads)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "this loss was differentiated before; linear_cross_entropy keeps its gradients for one backward only"
            )
        hidden_grad, grads = ctx.grads
        ctx.grads = None
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(loss_grad)
        grads = [None if grad is None else grad.mul_(loss_grad).to(ctx.dtype) for grad in grads]
        return hidden_grad, None, None, *grads


def _logits(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return float32 logits ``(rows, V)``."""
    parts = [rows @ weight.t() for weight in weights]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float()
