"""Mixture of experts against plain loops over rows and experts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmscale.nn.block import ACTIVATIONS
from mmscale.nn.moe import Experts, MoeConfig, MoeMlp, Router, biased_routers

DIM, ROWS = 6, 23
CASES: list[dict[str, Any]] = [
    {"router": order, "experts_per_token": number, **changes}
    for order, number, changes in itertools.product(
        ("softmax_then_topk", "topk_then_softmax"),
        (1, 3),
        ({}, {"shared_dim": 5}, {"shared_dim": 5, "shared_gate": True, "activation": "gelu"}, {"bias_rate": 0.3}),
    )
]
CASES += [{"router": "softmax_then_topk", "experts_per_token": number, "renormalise": True} for number in (1, 2, 7)]


def mixture(**changes: Any) -> MoeMlp:
    torch.manual_seed(3)
    found = MoeMlp(DIM, MoeConfig.model_validate({"num_experts": 7, "expert_dim": 8, **changes}))
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return found


def expected(layer: MoeMlp, hidden: Tensor, valid: list[bool]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Return the output, both losses and the chosen experts, computed one row and one expert at a time."""
    config = layer.config
    logits = hidden @ layer.gate.weight.T
    bias = layer.gate.bias_steps * config.bias_rate if config.bias_rate else torch.zeros(config.num_experts)
    rows, choices = [], []
    for row, scores in zip(hidden, logits, strict=True):
        before = scores if config.router == "topk_then_softmax" else scores.softmax(0)
        chosen = sorted(range(config.num_experts), key=lambda e: -(before[e] + bias[e]).item())[
            : config.experts_per_token
        ]
        weights = before[chosen].softmax(0) if config.router == "topk_then_softmax" else before[chosen]
        if config.renormalise:
            weights = weights / weights.sum()
        total = torch.zeros(DIM)
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ row).chunk(2)
            total = total + weight * (layer.experts.down_proj[expert] @ (ACTIVATIONS[config.activation](gate) * up))
        if config.shared_dim:
            scale = torch.sigmoid(layer.shared_expert_gate.weight @ row) if config.shared_gate else 1.0
            total = total + scale * layer.shared_expert(row[None])[0]
        rows.append(total)
        choices.append(chosen)
    counted = [number for number, each in enumerate(valid) if each]
    balance = z = torch.zeros(())
    for expert in range(config.num_experts):
        load = sum(expert in choices[number] for number in counted) / (len(counted) * config.experts_per_token)
        balance = balance + config.num_experts * load * logits.softmax(-1)[counted, expert].mean()
    z = logits[counted].logsumexp(-1).square().mean()
    return torch.stack(rows), torch.stack([balance, z]), choices


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_losses_and_gradients_are_those_of_a_loop(case: dict[str, Any]) -> None:
    layer = mixture(**case)
    if case.get("bias_rate"):
        layer.gate.bias_steps.copy_(torch.tensor([0, 3, -4, 1, 0, 2, -1]))
    torch.manual_seed(4)
    hidden = torch.randn(ROWS, DIM, requires_grad=True)
    valid = [number % 3 > 0 for number in range(ROWS)]
    answers = []
    for mixed, losses in (layer(hidden, torch.tensor(valid)), expected(layer, hidden, valid)[:2]):
        total = (mixed * torch.linspace(-1, 1, ROWS)[:, None]).sum() + 3 * losses[0] + 5 * losses[1]
        gradients = torch.autograd.grad(total, [hidden, *layer.parameters()])
        answers.append([mixed, losses, *gradients])
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_without_a_mask_every_row_counts_and_without_valid_rows_there_is_no_loss() -> None:
    layer = mixture(experts_per_token=2)
    hidden = torch.randn(ROWS, DIM)
    mixed, losses = layer(hidden, None)
    torch.testing.assert_close(losses, expected(layer, hidden, [True] * ROWS)[1])
    none, zero = layer(hidden, torch.zeros(ROWS, dtype=torch.bool))
    assert torch.equal(none, mixed)
    assert zero.tolist() == [0.0, 0.0]
    one, losses = layer(hidden[:1], None)
    torch.testing.assert_close(one, mixed[:1])
    torch.testing.assert_close(losses, expected(layer, hidden[:1], [True])[1])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch.nn.functional.grouped_mm is new in torch 2.10")
def test_the_kernel_of_all_experts_at_once_equals_one_expert_after_the_other() -> None:
    """CUDA uses this path in bfloat16; ``grouped_mm`` also runs on the CPU."""
    torch.manual_seed(3)
    experts = Experts(16, MoeConfig(num_experts=7, experts_per_token=1, expert_dim=8)).bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = torch.randn(17, 16).bfloat16().requires_grad_()
    counts = torch.tensor([3, 0, 4, 1, 0, 9, 0])
    answers = []
    for outputs in (experts._grouped(rows, counts), experts._split(rows, counts.tolist())):
        gradients = torch.autograd.grad(outputs.float().square().sum(), [rows, *experts.parameters()])
        answers.append([outputs, *gradients])
    for mine, theirs in zip(*answers, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_perfect_balance_costs_one() -> None:
    router = Router(4, MoeConfig(num_experts=4, experts_per_token=1, expert_dim=8))
    torch.nn.init.zeros_(router.weight)
    router.weight.data.fill_diagonal_(1e-4)
    hidden = torch.eye(4).repeat(3, 1)
    _, chosen, losses = router(hidden, torch.ones(12, dtype=torch.bool))
    assert chosen.flatten().tolist() == [0, 1, 2, 3] * 3
    assert losses.tolist() == pytest.approx([1.0, math.log(4) ** 2], rel=1e-3)
    collapsed = router(hidden[:1].repeat(5, 1) * 1e6, torch.ones(5, dtype=torch.bool))[2]
    assert collapsed[0].item() == pytest.approx(4.0)


def test_the_load_counts_valid_rows_only_in_training_and_moves_the_bias_towards_the_mean() -> None:
    layer = mixture(experts_per_token=2, bias_rate=0.1)
    hidden, valid = torch.randn(ROWS, DIM), torch.arange(ROWS) % 4 > 0
    *_, choices = expected(layer, hidden, valid.tolist())
    load = [sum(expert in row for row, each in zip(choices, valid, strict=True) if each) for expert in range(7)]
    layer(hidden, valid)
    assert layer.gate.load.tolist() == load
    layer(hidden, valid)
    assert layer.gate.load.tolist() == [2 * count for count in load]
    layer.eval()(hidden, valid)
    layer.train()
    layer.gate.weight.requires_grad_(requires_grad=False)
    layer(hidden, valid)
    assert layer.gate.load.tolist() == [2 * count for count in load]
    assert biased_routers(layer) == []
    layer.gate.weight.requires_grad_()
    assert biased_routers(layer) == [layer.gate]
    assert biased_routers(mixture(experts_per_token=2)) == []
    layer.gate.rebalance(torch.tensor([3, 3, 4, 3, 2, 3, 3]))
    assert layer.gate.bias_steps.tolist() == [0, 0, -1, 0, 1, 0, 0]
    layer.gate.rebalance(torch.tensor([0, 0, 0, 0, 0, 0, 1]))
    assert layer.gate.bias_steps.tolist() == [1, 1, 0, 1, 2, 1, -1]
    assert set(layer.state_dict()) & {"gate.load", "gate.bias_steps"} == {"gate.bias_steps"}


def test_weights_have_the_number_format_of_the_rows() -> None:
    router = Router(DIM, MoeConfig(num_experts=4, experts_per_token=2, expert_dim=8)).bfloat16()
    weights, _, losses = router(torch.randn(5, DIM).bfloat16(), torch.ones(5, dtype=torch.bool))
    assert (weights.dtype, losses.dtype) == (torch.bfloat16, torch.float32)
    reference = F.linear(torch.ones(1, DIM).bfloat16(), router.weight).float().softmax(-1).topk(2).values
    assert torch.equal(router(torch.ones(1, DIM).bfloat16(), torch.ones(1, dtype=torch.bool))[0], reference.bfloat16())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_per_token": 5}, "experts_per_token=5: there are 4 experts"),
        ({"renormalise": True, "router": "topk_then_softmax"}, "leave it false"),
        ({"shared_gate": True}, "there is no shared expert"),
        ({"every": 2}, "dense must be set"),
        ({"dense": {"kind": "dense", "hidden_dim": 8}}, "dense must be set"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {"num_experts": 4, "experts_per_token": 4, "expert_dim": 8}
    MoeConfig.model_validate({**values, "every": 2, "dense": {"kind": "dense", "hidden_dim": 8}})
    MoeConfig.model_validate({**values, "renormalise": True, "shared_gate": True, "shared_dim": 3})
    with pytest.raises(ValidationError, match=words):
        MoeConfig.model_validate({**values, **changes})


def test_a_new_layer_has_small_weights_and_whole_numbers_for_its_bias() -> None:
    torch.manual_seed(0)
    layer = MoeMlp(64, MoeConfig(num_experts=32, experts_per_token=2, expert_dim=16, bias_rate=0.1))
    for weight in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert {(name, values.dtype) for name, values in layer.named_buffers()} == {
        ("gate.bias_steps", torch.int64),
        ("gate.load", torch.int64),
    }
    assert not dict(MoeMlp(64, MoeConfig(num_experts=4, experts_per_token=2, expert_dim=16)).named_buffers())
