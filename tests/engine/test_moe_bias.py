"""The bias of routers: its effect, and its update by the load of the whole step on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmscale.nn.moe import MoeConfig
from mmscale.nn.router import RoutedRows, Router
from tests.engine.moe_programs import REFUSED, STEPS
from tests.engine.ranks import run_ranks


@pytest.mark.parametrize("order", ["softmax_then_topk", "topk_then_softmax"])
def test_a_bias_changes_the_choice_and_not_the_weights(order: str) -> None:
    values = {"num_experts": 5, "experts_per_token": 2, "expert_dim": 8, "router": order, "bias_rate": 0.1}
    torch.manual_seed(0)
    router = Router(7, MoeConfig.model_validate(values))
    router.bias_steps.copy_(torch.tensor([0, 9, -4, 1, 0]))
    hidden, valid = torch.randn(30, 7), torch.arange(30) % 3 > 0
    weights, chosen, sums = router(hidden, RoutedRows.text(valid))
    logits = hidden @ router.weight.T
    scores = logits.softmax(-1) if order == "softmax_then_topk" else logits
    expected, load = [], torch.zeros(5, dtype=torch.int64)
    for row in range(30):
        best = sorted(range(5), key=lambda e: -(scores[row, e] + 0.1 * router.bias_steps[e]).item())[:2]
        assert chosen[row].tolist() == best
        kept = scores[row, best]
        expected.append(kept if order == "softmax_then_topk" else kept.softmax(-1))
        load[best] += int(valid[row])
    torch.testing.assert_close(weights, torch.stack(expected))
    assert torch.equal(sums.load, torch.stack([load, torch.zeros_like(load)]))
    assert not torch.equal(chosen, scores.topk(2).indices)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (1, {"zero_stage": 0}),
        (2, {"zero_stage": 3, "activation_checkpointing": True}),
    ],
)
def test_all_ranks_move_it_by_the_load_of_the_whole_step(ranks: int, engine: dict[str, Any]) -> None:
    answers = run_ranks("tests.engine.moe_programs:balance", ranks, {"engine_values": engine, "train": ["all"]})
    bias = torch.zeros(4, 6)
    for step in range(STEPS):
        load = torch.tensor([answer["loads"][step] for answer in answers]).sum(0)
        if step != REFUSED:
            mean = load.mean(1, keepdim=True)
            bias += (load < mean).float() - (load > mean).float()
        for answer in answers:
            assert answer["bias"][step] == bias.tolist(), step
    assert bias.abs().max() > 1


@pytest.mark.dist
def test_a_frozen_router_keeps_its_bias() -> None:
    arguments = {"engine_values": {"zero_stage": 0}, "train": ["connector"]}
    answer = run_ranks("tests.engine.moe_programs:balance", 1, arguments)[0]
    assert torch.tensor(answer["bias"]).abs().sum() == 0
