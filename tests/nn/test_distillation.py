"""Teachers in the chunked loss against plain torch in float64: values, gradients, and losses per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mmscale.nn import cross_entropy
from mmscale.nn.cross_entropy import SoftTarget, ZLoss, linear_cross_entropy
from tests.nn.test_cross_entropy import case

ROWS, VOCAB, EXTRA = 50, 40, 5


def teacher(seed: int, share: float, temperature: float, dim: int = 20, extra: int = 0) -> SoftTarget:
    """Return a teacher with another width than the student, and with another split of the ids into two matrices."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, dim, generator=generator)
    matrix = torch.randn(VOCAB, dim, generator=generator)
    weights = (matrix,) if not extra else (matrix[:-extra], matrix[-extra:])
    return SoftTarget(hidden, weights, share, temperature, torch.zeros(ROWS))


def expected(
    logits: Tensor, labels: Tensor, scale: Tensor, z_coefficient: float, teachers: list[SoftTarget]
) -> tuple[Tensor, list[Tensor]]:
    """Return the same loss from logits in float64, and each teacher's weighted divergences."""
    hard = 1 - sum(each.share for each in teachers)
    total = hard * (F.cross_entropy(logits, labels, reduction="none", ignore_index=-100) * scale).sum()
    total = total + z_coefficient * (logits.logsumexp(-1).square() * scale).sum()
    divergences = []
    for each in teachers:
        theirs = each.hidden.double() @ torch.cat(each.weights).double().t()
        heat = each.temperature
        ours, wanted = (values.div(heat).log_softmax(-1) for values in (logits, theirs))
        divergence = F.kl_div(ours, wanted, reduction="none", log_target=True).sum(-1) * scale
        divergences.append(divergence)
        total = total + each.share * heat**2 * divergence.sum()
    return total, divergences


@pytest.mark.parametrize("size", [7, 1000])
@pytest.mark.parametrize(
    "teachers",
    [[(0.5, 1.0)], [(1.0, 1.0)], [(0.5, 2.0)], [(1.0, 2.0)], [(0.3, 1.0), (0.6, 4.0)], []],
    ids=lambda shares: "+".join(f"{share}@{heat}" for share, heat in shares) or "none",
)
def test_equals_torch_in_float64(
    teachers: list[tuple[float, float]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worst relative differences: 1e-7 in the loss (float32), 5e-7 of a gradient's largest entry."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocab_size, device: size)
    hidden, weight, labels, scale = case()
    body, more = (part.detach().requires_grad_() for part in (weight[:-EXTRA], weight[-EXTRA:]))
    soft = [teacher(n, *each, extra=3 * n) for n, each in enumerate(teachers)]
    z_loss, rows = ZLoss(0.3, torch.zeros(ROWS)), torch.zeros(ROWS)
    ours = linear_cross_entropy(hidden, body, labels, scale, rows, more, z_loss, soft)
    leaves = [part.detach().double().requires_grad_() for part in (hidden, body, more)]
    logits = leaves[0] @ torch.cat(leaves[1:]).t()
    theirs, divergences = expected(logits, labels, scale.double(), 0.3, soft)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(0.37 * ours, (hidden, body, more)),
        torch.autograd.grad(0.37 * theirs, leaves),
        strict=True,
    ):
        assert (found - wanted).abs().max() < 3e-6 * wanted.abs().max()
    for target, divergence in zip(soft, divergences, strict=True):
        torch.testing.assert_close(target.row_losses.double(), divergence.detach(), rtol=1e-5, atol=1e-6)
    entropies = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100) * scale
    torch.testing.assert_close(rows.double(), entropies.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["head", "rows"])
def test_each_gradient_is_there_without_the_other(frozen: str) -> None:
    hidden, weight, labels, scale = case()
    soft = [teacher(1, 0.7, 2.0)]
    whole = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, scale, soft_targets=soft), (hidden, weight)
    )
    if frozen == "head":
        loss = linear_cross_entropy(hidden, weight.detach(), labels, scale, soft_targets=soft)
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], whole[0])
    else:
        loss = linear_cross_entropy(hidden.detach(), weight, labels, scale, soft_targets=soft)
        assert torch.equal(torch.autograd.grad(loss, weight)[0], whole[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, scale, soft_targets=soft).requires_grad


def test_rows_of_weight_zero_cost_nothing_and_the_teacher_learns_nothing() -> None:
    hidden, weight, labels, scale = case()
    target = teacher(1, 0.5, 1.0)
    matrix = target.weights[0].requires_grad_()
    linear_cross_entropy(hidden, weight, labels, scale, soft_targets=[target]).backward()
    assert hidden.grad is not None
    assert not hidden.grad[::3].any()
    assert not target.row_losses[::3].any()
    assert matrix.grad is None


@given(heat=st.floats(0.5, 8), share=st.floats(0.05, 1))
@settings(max_examples=20, deadline=None)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(heat: float, share: float) -> None:
    """Only the cross-entropy with its share remains, at any temperature."""
    hidden, weight, labels, scale = case()
    itself = SoftTarget(hidden.detach(), (weight.detach(),), share, heat, torch.zeros(ROWS))
    plain = linear_cross_entropy(hidden, weight, labels, scale)
    taught = linear_cross_entropy(hidden, weight, labels, scale, soft_targets=[itself])
    torch.testing.assert_close(taught, (1 - share) * plain, rtol=1e-5, atol=1e-4)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (taught, plain)]
    torch.testing.assert_close(grads[0], (1 - share) * grads[1], rtol=1e-4, atol=1e-5)
    assert itself.row_losses.abs().max() < 1e-5
