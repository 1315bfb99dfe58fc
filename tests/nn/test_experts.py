"""Both kernels of the experts, and the dispatch, against loops over single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.nn.block import ACTIVATIONS, Activation
from mmscale.nn.dropout import Dropout, SubLayer
from mmscale.nn.experts import Dispatch, Experts, _ExpertLoop, _Gate, _group, _GroupedExperts

DIM, HIDDEN, NUM_EXPERTS = 16, 8, 5
COUNTS = {"some": [3, 0, 4, 9, 1], "one row": [0, 0, 1, 0, 0], "one expert": [0, 17, 0, 0, 0]}
grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="grouped_mm is new in torch 2.10")
KERNELS = [_ExpertLoop, pytest.param(_GroupedExperts, marks=grouped_mm)]


@pytest.fixture(params=[0, 256, 1 << 20], ids=["alone", "groups", "together"])
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of the loop compute each alone, in groups of 256 bytes of projected rows, or all together."""
    monkeypatch.setattr("mmscale.nn.experts._GROUP_BYTES", request.param)


def stacked(activation: str = "silu", dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(3)
    experts = Experts(DIM, NUM_EXPERTS, 2, HIDDEN, Activation(activation))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts.to(dtype)


def one_by_one(
    rows: Tensor, weights: Tensor, experts: Experts, counts: list[int], activation: str, factors: Tensor
) -> Tensor:
    """Return each row's weighted output in float32, with ``factors`` on the values between the projections."""
    found = []
    numbers = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, weight, expert, factor in zip(rows.float(), weights.float(), numbers, factors, strict=True):
        gate, up = (experts.gate_up_proj[expert].float() @ row).chunk(2)
        hidden = ACTIVATIONS[Activation(activation)](gate) * up * factor
        found.append(weight * (experts.down_proj[expert].float() @ hidden))
    return torch.stack(found)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("activation", "rate"), [("silu", 0.0), ("relu_squared", 0.0), ("silu", 0.25)])
def test_values_and_gradients_are_those_of_single_rows(
    kernel: Any, dtype: torch.dtype, bound: float, counts: list[int], activation: str, rate: float
) -> None:
    """``grouped_mm`` also runs on the CPU, in both number formats."""
    experts = stacked(activation, dtype)
    rows = torch.randn(sum(counts), DIM).to(dtype).requires_grad_()
    weights = torch.rand(sum(counts)).to(dtype).requires_grad_()
    direction = torch.randn(sum(counts), DIM)
    dropout, factors = None, torch.ones(sum(counts), HIDDEN)
    if rate:
        dropout = Dropout.for_microbatch(rate, (1, 0), [0], [sum(counts)], torch.device("cpu"))
        factors = ~dropout.dropped(SubLayer.FEED_FORWARD, HIDDEN) / (1 - rate)
        assert len(factors.unique()) == 2
    gate = _Gate(experts.activate, dropout)
    mine = kernel.apply(rows, weights, experts.gate_up_proj, experts.down_proj, torch.tensor(counts), gate)
    answers = []
    for outputs in (mine, one_by_one(rows, weights, experts, counts, activation, factors)):
        gradients = torch.autograd.grad((outputs.float() * direction).sum(), [rows, weights, *experts.parameters()])
        answers.append([outputs, *gradients])
    for value, truth in zip(*answers, strict=True):
        assert value.dtype is dtype
        size = truth.float().abs().max()
        assert size > 0.01
        assert (value.float() - truth.float()).abs().max() < bound * size
    assert not answers[0][3][[count == 0 for count in counts]].any()


def test_without_rows_every_gradient_is_zero() -> None:
    experts = stacked()
    rows, weights = torch.zeros(0, DIM, requires_grad=True), torch.zeros(0, requires_grad=True)
    outputs = experts(rows, weights, torch.zeros(NUM_EXPERTS, dtype=torch.int64))
    outputs.sum().backward()
    assert outputs.shape == (0, DIM)
    for leaf in (rows, weights, *experts.parameters()):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_frozen_experts_have_no_gradient_and_pass_that_of_the_rows(kernel: Any) -> None:
    experts, counts = stacked(), torch.tensor(COUNTS["some"])
    rows, weights = torch.randn(17, DIM, requires_grad=True), torch.rand(17)
    gradients = []
    for frozen in (False, True):
        experts.requires_grad_(not frozen)
        gate = _Gate(experts.activate, None)
        kernel.apply(rows, weights, experts.gate_up_proj, experts.down_proj, counts, gate).sum().backward()
        assert (experts.down_proj.grad is None, experts.gate_up_proj.grad is None) == (frozen, frozen)
        gradients.append(rows.grad)
        rows.grad = experts.down_proj.grad = experts.gate_up_proj.grad = None
    assert torch.equal(*gradients)


@pytest.mark.parametrize("capacity", [None, 3, 1, 0])
@pytest.mark.parametrize("valid", [range(9), [1, 2, 5, 6, 8], []], ids=["all", "some", "none"])
def test_the_dispatch_takes_the_first_valid_rows_of_each_expert(capacity: int | None, valid: list[int]) -> None:
    torch.manual_seed(5)
    chosen = torch.stack([torch.randperm(NUM_EXPERTS - 1)[:2] for _ in range(9)])  # The last expert has no row.
    hidden = torch.randn(9, DIM, requires_grad=True)
    weights = torch.rand(9, 2, requires_grad=True)
    scale = torch.randn(NUM_EXPERTS, DIM)  # The computation of the experts.
    taken, total = [0] * NUM_EXPERTS, []
    for row in range(9):
        parts = [0 * hidden[row] + 0 * weights[row].sum()]
        for choice, expert in enumerate(chosen[row].tolist()):
            if row in valid and (capacity is None or taken[expert] < capacity):
                taken[expert] += 1
                parts.append(weights[row, choice] * hidden[row] * scale[expert])
        total.append(torch.stack(parts).sum(0))
    dispatch = Dispatch.of(chosen, NUM_EXPERTS, None if len(valid) == 9 else torch.tensor(valid).long(), capacity)
    assert dispatch.counts.tolist() == taken
    assert len(dispatch.choices) == sum(taken)
    experts = torch.arange(NUM_EXPERTS).repeat_interleave(dispatch.counts)
    mine = dispatch.sum(dispatch.gather(hidden) * dispatch.weights(weights)[:, None] * scale[experts])
    direction = torch.randn(9, DIM)
    answers = [
        [outputs, *torch.autograd.grad((outputs * direction).sum(), [hidden, weights])]
        for outputs in (mine, torch.stack(total))
    ]
    for value, truth in zip(*answers, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("group_bytes")
def test_groups_of_experts_do_not_change_the_result(frozen: bool) -> None:
    counts = COUNTS["some"]
    experts, rows, weights = stacked().requires_grad_(not frozen), torch.randn(17, DIM), torch.rand(17)
    leaves = [rows.requires_grad_(), weights.requires_grad_(), *(p for p in experts.parameters() if p.requires_grad)]
    dropout = Dropout.for_microbatch(0.25, (1, 0), [0], [17], torch.device("cpu"))
    factors = ~dropout.dropped(SubLayer.FEED_FORWARD, HIDDEN) / 0.75
    answers = [
        [outputs, *torch.autograd.grad(outputs.square().sum(), leaves)]
        for outputs in (
            experts(rows, weights, torch.tensor(counts), dropout),
            one_by_one(rows, weights, experts, counts, "silu", factors),
        )
    ]
    for value, truth in zip(*answers, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)


def test_a_group_has_as_many_experts_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmscale.nn.experts._GROUP_BYTES", 40)
    counts = [1, 0, 3, 0, 9, 0, 2, 2, 1]
    groups = _group(counts, 10)
    assert [list(experts) for experts, _ in groups] == [[0, 1, 2, 3], [4], [5, 6, 7], [8]]
    assert [lengths for _, lengths in groups] == [[1, 0, 3, 0], [9], [0, 2, 2], [1]]
