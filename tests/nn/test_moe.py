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

from mmscale.engine.graph import recompute
from mmscale.nn.block import ACTIVATIONS
from mmscale.nn.dropout import Dropout
from mmscale.nn.moe import MoeConfig, MoeMlp
from mmscale.nn.router import RoutedRows, Router, RouterTensors

DIM, ROWS, EXPERTS = 6, 23, 8
OFFSETS = (0, 9, 9, 14, ROWS)
SIGMOID = {"router": "sigmoid", "renormalise": True, "scale": 2.5}
CASES: list[dict[str, Any]] = [
    {"router": order, "experts_per_token": number, **changes}
    for order, number, changes in itertools.product(
        ("softmax_then_topk", "topk_then_softmax"),
        (1, 3),
        ({}, {"shared_dim": 5}, {"shared_dim": 5, "shared_gate": True, "activation": "gelu"}, {"bias_rate": 0.3}),
    )
]
CASES += [{"router": "softmax_then_topk", "experts_per_token": number, "renormalise": True} for number in (1, 2, 8)]
CASES += [{**SIGMOID, "experts_per_token": number, "bias_rate": 0.2} for number in (1, 3)]
CASES += [
    {"router": order, "experts_per_token": 2, "choice_groups": groups, "groups_per_token": chosen, **more}
    for order, groups, chosen, more in [
        ("sigmoid", 4, 2, {"bias_rate": 0.2, "renormalise": True}),
        ("sigmoid", 8, 3, {"scale": 0.5}),
        ("softmax_then_topk", 4, 1, {"scale": 16.0}),
        ("topk_then_softmax", 2, 1, {}),
    ]
]
CASES += [{"experts_per_token": 2, "balance": scope} for scope in ("global", "microbatch", "sequence")]
CASES += [{"experts_per_token": 3, "balance_groups": 4, "balance": scope} for scope in ("global", "sequence")]


def mixture(**changes: Any) -> MoeMlp:
    torch.manual_seed(3)
    found = MoeMlp(DIM, MoeConfig.model_validate({"num_experts": EXPERTS, "expert_dim": 8, **changes}))
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return found


def rows_of(valid: list[bool]) -> RoutedRows:
    """Return the rows of four documents, of which one is empty; every fourth row is an image row."""
    kind = torch.tensor([int(number % 4 == 1) for number in range(ROWS)])
    return RoutedRows(torch.tensor(valid), kind, torch.tensor(OFFSETS))


def score(config: MoeConfig, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of one row and its probabilities."""
    if config.router == "sigmoid":
        return logits.sigmoid(), logits.sigmoid() / logits.sigmoid().sum()
    return (logits if config.router == "topk_then_softmax" else logits.softmax(0)), logits.softmax(0)


def choose(config: MoeConfig, biased: list[float]) -> list[int]:
    """Return the experts of one row, the best first."""
    size = config.num_experts // config.choice_groups
    groups = [list(range(start, start + size)) for start in range(0, config.num_experts, size)]

    def group_score(group: list[int]) -> float:
        return sum(sorted((biased[e] for e in group), reverse=True)[: 2 if config.router == "sigmoid" else 1])

    best = sorted(groups, key=group_score, reverse=True)[: config.groups_per_token if len(groups) > 1 else None]
    return sorted(itertools.chain(*best), key=lambda e: -biased[e])[: config.experts_per_token]


def expected(layer: MoeMlp, hidden: Tensor, rows: RoutedRows) -> tuple[Tensor, RouterTensors, list[list[int]]]:
    """Return the output, the sums and the chosen experts, computed one row and one expert at a time."""
    config, logits = layer.config, hidden @ layer.gate.weight.T
    bias = layer.gate.bias_steps * config.bias_rate if config.bias_rate else torch.zeros(config.num_experts)
    outputs, choices, probabilities = [], [], []
    for row, own, valid in zip(hidden, logits, rows.valid, strict=True):
        scores, probability = score(config, own)
        chosen = choose(config, (scores + bias).tolist())
        weights = scores[chosen].softmax(0) if config.router == "topk_then_softmax" else scores[chosen]
        if config.renormalise:
            weights = weights / weights.sum()
        total = torch.zeros(DIM)
        for weight, expert in zip(weights * config.scale, chosen if valid else (), strict=bool(valid)):
            gate, up = (layer.experts.gate_up_proj[expert] @ row).chunk(2)
            total = total + weight * (layer.experts.down_proj[expert] @ (ACTIVATIONS[config.activation](gate) * up))
        if config.shared_dim:
            scale = torch.sigmoid(layer.shared_expert_gate.weight @ row) if config.shared_gate else 1.0
            total = total + scale * layer.shared_expert(row[None])[0]
        outputs.append(total)
        choices.append(chosen)
        probabilities.append(probability)
    counted = [number for number in range(ROWS) if rows.valid[number]]
    documents = [[n for n in counted if start <= n < stop] for start, stop in itertools.pairwise(OFFSETS)]
    scopes = {"global": [], "microbatch": [counted], "sequence": documents}[config.balance]
    balance = sum((len(scope) * balance_of(config, scope, choices, probabilities) for scope in scopes if scope), zero())
    load, entropy = torch.zeros(2, config.num_experts, dtype=torch.int64), torch.zeros(2)
    for number in counted:
        load[int(rows.kind[number]), choices[number]] += 1
        entropy[int(rows.kind[number])] -= (probabilities[number] * probabilities[number].log()).sum().item()
    importance = sum((probabilities[number] for number in counted), torch.zeros(config.num_experts))
    z = sum((logits[number].logsumexp(-1).square() for number in counted), zero())
    return torch.stack(outputs), RouterTensors(importance, balance, z, load, entropy, zero().long()), choices


def zero() -> Tensor:
    return torch.zeros(())


def balance_of(config: MoeConfig, scope: list[int], choices: list[list[int]], probabilities: list[Tensor]) -> Tensor:
    """Return (number of groups) x the sum over groups of (share of the choices) x (mean probability)."""
    size = config.num_experts // (config.balance_groups or config.num_experts)
    total = zero()
    for group in range(config.num_experts // size):
        members = range(group * size, (group + 1) * size)
        share = sum(e in members for n in scope for e in choices[n]) / (len(scope) * config.experts_per_token)
        total = total + share * sum((probabilities[n][e] for n in scope for e in members), zero()) / len(scope)
    return total * (config.num_experts // size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_sums_and_gradients_are_those_of_a_loop(case: dict[str, Any]) -> None:
    layer = mixture(**case)
    if case.get("bias_rate"):
        layer.gate.bias_steps.copy_(torch.tensor([0, 3, -4, 1, 0, 2, -1, 1]))
    torch.manual_seed(4)
    hidden = torch.randn(ROWS, DIM, requires_grad=True)
    rows = rows_of([number % 3 > 0 for number in range(ROWS)])
    answers = []
    for mixed, sums in (layer(hidden, rows), expected(layer, hidden, rows)[:2]):
        total = (mixed * torch.linspace(-1, 1, ROWS)[:, None]).sum() + 3 * sums.balance + 5 * sums.z
        total = total + (sums.importance * torch.linspace(-1, 2, EXPERTS)).sum()
        gradients = torch.autograd.grad(total, [hidden, *layer.parameters()])
        answers.append([mixed, *sums, *gradients])
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_without_valid_rows_sums_outputs_and_gradients_are_zero() -> None:
    for scope in ("global", "microbatch", "sequence"):
        layer = mixture(experts_per_token=2, balance=scope, capacity_factor=1.0)
        hidden = torch.randn(ROWS, DIM, requires_grad=True)
        outputs, sums = layer(hidden, rows_of([False] * ROWS))
        assert all(each.abs().sum() == 0 for each in (outputs, *sums))
        (outputs.sum() + sums.balance + sums.importance.sum() + sums.z).backward()
        for leaf in (hidden, *layer.parameters()):
            assert leaf.grad is not None
            assert not leaf.grad.any()


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 100.0])
def test_an_expert_computes_at_most_its_capacity(factor: float) -> None:
    layer = mixture(experts_per_token=2, capacity_factor=factor)
    hidden = torch.randn(ROWS, DIM)
    rows = rows_of([number % 3 > 0 for number in range(ROWS)])
    (outputs, sums), (complete, _, choices) = layer(hidden, rows), expected(layer, hidden, rows)
    capacity, taken = math.ceil(factor * int(rows.valid.sum()) * 2 / EXPERTS), [0] * EXPERTS
    dropped, parts = 0, []
    for number, chosen in enumerate(choices):
        parts.append(torch.zeros(DIM))
        weights = (layer.gate.weight @ hidden[number]).softmax(0)
        for expert in chosen if rows.valid[number] else ():
            taken[expert] += 1
            if taken[expert] > capacity:
                dropped += 1
                continue
            gate, up = (layer.experts.gate_up_proj[expert] @ hidden[number]).chunk(2)
            parts[-1] = parts[-1] + weights[expert] * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(outputs, torch.stack(parts), rtol=1e-4, atol=1e-5)
    assert sums.dropped.item() == dropped
    assert (dropped == 0) == (factor == 100.0)
    assert sums.load.sum(0).tolist() == taken
    torch.testing.assert_close(layer.eval()(hidden, rows)[0], complete, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"expert_dropout": 0.3, "jitter": 0.4}], ids=str)
def test_noise_does_not_depend_on_the_partition_of_the_rows_and_needs_no_state(changes: dict[str, Any]) -> None:
    """Two microbatches have the sum of the gradients of one, also if the backward pass recomputes the layer."""
    layer = mixture(experts_per_token=3, **changes)
    hidden, direction = torch.randn(ROWS, DIM), torch.randn(ROWS, DIM)
    rows = rows_of([number % 3 > 0 for number in range(ROWS)])
    found = []
    for parts, again in ([[ROWS], False], [[9, ROWS - 9], False], [[9, ROWS - 9], True]):
        undo = recompute([layer]) if again else None
        outputs, start = [], 0
        for lane, count in enumerate(parts):
            own = slice(start, start + count)
            lanes = [0, 1] if len(parts) == 1 else [lane]
            counts = [9, ROWS - 9] if len(parts) == 1 else [count]
            noise = Dropout.for_microbatch(0.0, (1, 0), lanes, counts, torch.device("cpu"))
            part = layer(hidden[own], RoutedRows.text(rows.valid[own]), noise.for_block(2))[0]
            (part * direction[own]).sum().backward()
            outputs.append(part.detach())
            start += count
        found.append([torch.cat(outputs), *(parameter.grad for parameter in layer.parameters())])
        layer.zero_grad()
        if undo is not None:
            undo()
    for value, truth in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    assert all(map(torch.equal, found[2], found[1]))
    if changes:
        assert not torch.allclose(found[0][0], layer(hidden, rows)[0], atol=0.01)


def test_perfect_balance_costs_one() -> None:
    config = MoeConfig(num_experts=4, experts_per_token=1, expert_dim=8, balance="microbatch")
    router = Router(4, config)
    torch.nn.init.zeros_(router.weight)
    router.weight.data.fill_diagonal_(1e-4)
    hidden = torch.eye(4).repeat(3, 1)
    _, chosen, sums = router(hidden, RoutedRows.text(torch.ones(12, dtype=torch.bool)))
    assert chosen.flatten().tolist() == [0, 1, 2, 3] * 3
    assert (sums.balance / 12).item() == pytest.approx(1.0, rel=1e-3)
    assert (sums.z / 12).item() == pytest.approx(math.log(4) ** 2, rel=1e-3)
    assert (sums.entropy[0] / 12).item() == pytest.approx(math.log(4), rel=1e-3)
    collapsed = router(hidden[:1].repeat(5, 1) * 1e6, RoutedRows.text(torch.ones(5, dtype=torch.bool)))[2]
    assert (collapsed.balance / 5).item() == pytest.approx(4.0)


def test_the_bias_moves_towards_the_mean_load() -> None:
    layer = mixture(experts_per_token=2, bias_rate=0.1, num_experts=7)
    layer.gate.rebalance(torch.tensor([3, 3, 4, 3, 2, 3, 3]))
    assert layer.gate.bias_steps.tolist() == [0, 0, -1, 0, 1, 0, 0]
    layer.gate.rebalance(torch.tensor([0, 0, 0, 0, 0, 0, 1]))
    assert layer.gate.bias_steps.tolist() == [1, 1, 0, 1, 2, 1, -1]
    assert "gate.bias_steps" in layer.state_dict()


def test_the_router_computes_in_float32_and_weighs_in_the_format_of_the_rows() -> None:
    router = Router(DIM, MoeConfig(num_experts=4, experts_per_token=2, expert_dim=8)).bfloat16()
    hidden, rows = torch.randn(5, DIM).bfloat16(), RoutedRows.text(torch.ones(5, dtype=torch.bool))
    weights, _, sums = router(hidden, rows)
    assert (weights.dtype, sums.z.dtype) == (torch.bfloat16, torch.float32)
    reference = F.linear(hidden.float(), router.weight.float()).softmax(-1).topk(2).values
    assert torch.equal(weights, reference.bfloat16())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts_per_token": 5}, "experts_per_token=5: there are 4 experts"),
        ({"renormalise": True, "router": "topk_then_softmax"}, "leave it false"),
        ({"shared_gate": True}, "there is no shared expert"),
        ({"every": 2}, "dense must be set"),
        ({"dense_first": 1}, "dense must be set"),
        ({"choice_groups": 3}, "must divide num_experts=4"),
        ({"choice_groups": 2, "groups_per_token": 3}, "at least groups_per_token=3"),
        ({"choice_groups": 2, "groups_per_token": 1}, "the chosen groups have 2 experts"),
        ({"balance_groups": 3}, "balance_groups=3: must divide num_experts=4"),
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
    }
    assert not dict(MoeMlp(64, MoeConfig(num_experts=4, experts_per_token=2, expert_dim=16)).named_buffers())


def test_first_blocks_and_every_nth_block_may_be_dense() -> None:
    values = {"num_experts": 4, "experts_per_token": 2, "expert_dim": 8, "dense": {"kind": "dense", "hidden_dim": 8}}
    for changes, blocks in (
        ({"dense_first": 2}, [2, 3, 4, 5]),
        ({"every": 2}, [1, 3, 5]),
        ({"every": 2, "dense_first": 3}, [3, 5]),
    ):
        config = MoeConfig.model_validate({**values, **changes})
        assert [number for number in range(6) if config.for_block(number).has_experts] == blocks
