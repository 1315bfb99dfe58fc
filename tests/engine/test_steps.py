"""Optimizer steps on real ranks against plain torch AdamW over the whole batch in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmscale.optim.config import AdamWConfig
from mmscale.optim.schedule import LearningRates, freeze, parameter_groups, trained_components
from mmscale.optim.stages import StageConfig
from tests.engine.programs import LANES, stage
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyModel, ToyObjective, toy_batch, toy_model

STEPS = 6
FROZEN = {"stage_changes": {"train": ["vision", "connector"]}}
# The blocks are trained after a frozen embedding and a frozen tower: none of their inputs has a gradient.
LATE = {"stage_changes": {"train": ["decoder"], "learning_rate": {"default": 1e-2}}}
# One component far above its limit, one far below, one without a limit. A large eps makes AdamW's steps depend on the
# scale of the gradient.
BY_COMPONENT = {
    "stage_changes": {
        "clip": {"vision": 0.01, "connector": 100.0, "embedding": 0.0, "default": 0.2},
        "optimizer": {"kind": "adamw", "eps": 0.1},
    }
}
CASES: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 2},
    {"zero": 3},
    {"zero": 3, "persistent_parameter_elements": 1000, "live_parameter_elements": 0},
    {"zero": 3, "activation_checkpointing": True, "gather_bucket_elements": 0, "reduce_bucket_elements": 100},
    {"zero": 0, "activation_checkpointing": True},
    {"zero": 2, **FROZEN},
    {"zero": 3, **FROZEN},
    {"zero": 3, **LATE},
    {"zero": 3, "persistent_parameter_elements": 1000, "activation_checkpointing": True, **LATE},
    *({"zero": zero, **BY_COMPONENT} for zero in (0, 1, 2, 3)),
]
pytestmark = pytest.mark.dist


def clip_(model: ToyModel, plan: StageConfig) -> Tensor:
    """Clip with torch. Return the norm of the whole gradient before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), plan.clip if isinstance(plan.clip, float) else math.inf)
    limits = plan.clip if isinstance(plan.clip, dict) else {}
    for component, parameters in model.components().items():
        limit = limits.get(component, limits.get("default", 0.0))
        if limit:
            nn.utils.clip_grad_norm_(parameters, limit)
    return norm


def reference(stage_changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the reference: all lanes in one process, without engine or DeepSpeed."""
    model, objective, plan = toy_model(), ToyObjective(), stage(**(stage_changes or {}))
    freeze(model, model.components(), plan)
    names = trained_components(model.components(), plan)
    assert isinstance(plan.optimizer, AdamWConfig)
    betas, eps = plan.optimizer.betas, plan.optimizer.eps
    optimizer = torch.optim.AdamW(parameter_groups(model, model.components(), plan), betas=betas, eps=eps)
    reports = []
    for step in range(STEPS):
        batches = [toy_batch(step, lane, empty=step % 2 == 1 and lane == 2) for lane in range(LANES)]
        weight = sum(batch.weight for batch in batches)
        outputs = [objective(model, batch) for batch in batches]
        loss = torch.stack([output.loss_sum for output in outputs]).sum() / weight
        optimizer.zero_grad()
        loss.backward()
        norm = clip_(model, plan)
        rates = LearningRates(plan, names).at(step)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["component"]]
        optimizer.step()
        accuracy = sum(float(output.metrics["accuracy"]) for output in outputs) / weight
        reports.append([loss.item(), norm.item(), weight, True, accuracy])
    return {"reports": reports, "weights": {n: p.detach().view(-1).tolist() for n, p in model.named_parameters()}}


def check(found: dict[str, Any], truth: dict[str, Any]) -> None:
    for mine, theirs in zip(found["reports"], truth["reports"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-6)
    for name, values in truth["weights"].items():
        # AdamW's first steps divide a gradient by its own magnitude, so rounding of tiny gradients changes the weights.
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(values), rtol=1e-4, atol=3e-6)
    assert found["steps"] == STEPS


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_equal_plain_torch_at_any_world_size(world_size: int) -> None:
    chosen = {1: (0, 1, 3, 8, 9, 11, 14), 2: range(len(CASES)), 4: (0, 1, 3, 8, 9)}
    cases = [CASES[index] for index in chosen[world_size]]
    ranks = run_ranks("tests.engine.programs:train_cases", world_size, {"cases": cases})
    assert all(rank == ranks[0] for rank in ranks), "ranks report different values"
    for case, found in zip(cases, ranks[0], strict=True):
        check(found, reference(case.get("stage_changes")))


def test_bad_and_empty_steps_change_nothing_on_any_rank() -> None:
    plain = [{"zero": zero, "steps": 2} for zero in (0, 1, 2, 3)]
    bad = [{"zero": zero, "steps": 3, "bad_step": 2} for zero in (0, 1, 2, 3)]
    empty = [{"zero": zero, "steps": 3, "null_step": 2} for zero in (0, 3)]
    # In bf16 DeepSpeed has another optimizer wrapper at every stage. Each must skip the update too.
    half = [{"zero": zero, "steps": 3, "bad_step": 2, "precision": "bf16"} for zero in (0, 1, 2, 3)]
    answers = run_ranks("tests.engine.programs:train_cases", 2, {"cases": plain + bad + empty + half})[0]
    for case, answer in zip(bad + empty, answers[4:10], strict=True):
        before = answers[case["zero"]]
        assert answer["weights"] == before["weights"]
        assert answer["steps"] == before["steps"] == 2
        assert [report[3] for report in answer["reports"]] == [True, True, False]
    assert all(answer["reports"][2][2] == 0 for answer in answers[8:10])
    for answer in answers[10:]:
        assert [report[3] for report in answer["reports"]] == [True, True, False]
        assert all(value == value for values in answer["weights"].values() for value in values)


def test_ranks_with_different_numbers_of_microbatches_fail_together() -> None:
    said = run_ranks("tests.engine.programs:uneven", 2)
    assert all("same number" in sentence for sentence in said)


@pytest.mark.fault
@pytest.mark.parametrize("where", ["between", "inside"])
def test_a_rank_that_dies_is_noticed(where: str) -> None:
    said, nothing = run_ranks("tests.engine.programs:lonely", 2, {"where": where})
    assert "a peer is lost" in said
    assert nothing is None


def test_looking_at_the_model_between_steps_disturbs_nothing() -> None:
    cases = [{"zero": zero, "look": look} for zero in (0, 3) for look in (False, True)]
    answers = run_ranks("tests.engine.programs:train_cases", 2, {"cases": cases})[0]
    for quiet, looked in ((answers[0], answers[1]), (answers[2], answers[3])):
        assert looked["weights"] == quiet["weights"]
        assert looked["reports"] == quiet["reports"]
