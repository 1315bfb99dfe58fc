"""The losses of routers are those of the whole step, however its documents are divided among ranks and microbatches."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.dist import World
from mmscale.engine.engine import Engine
from mmscale.engine.graph import RouterSums
from mmscale.models.build import build_model, media_spec
from mmscale.nn.router import routers
from tests.engine.moe_programs import MICROBATCHES, SCOPES, documents, scoped_model, sharpen_
from tests.engine.ranks import run_ranks
from tests.models.packs import pack


@cache
def expected(scope: str) -> dict[str, Any]:
    """Return loss and gradients of all documents in one pack, by the definition of each loss."""
    settings = scoped_model(scope)
    model, mlp = build_model(settings, seed=3), settings.decoder.mlp
    sharpen_(model)
    batch = pack(documents(media_spec(settings)), media_spec(settings))
    inputs: list[Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, output: inputs.append(F.linear(args[0], module.weight)))
    hidden = model(batch).hidden
    losses = F.cross_entropy(model.head(hidden), batch.labels, reduction="none", ignore_index=-100)
    cross_entropy = (losses * batch.loss_weights).sum() / batch.weight
    balance = z = torch.zeros(())
    bounds = [0, len(batch.token_ids)] if scope == "global" else batch.segments.bounds
    for logits in inputs:
        probabilities = logits.softmax(-1)
        z = z + logits.logsumexp(-1).square().mean() / len(inputs)
        chosen = F.one_hot(probabilities.topk(mlp.experts_per_token).indices, mlp.num_experts).sum(1).float()
        for start, stop in itertools.pairwise(bounds):
            share = chosen[start:stop].mean(0) / mlp.experts_per_token
            own = mlp.num_experts * (share * probabilities[start:stop].mean(0)).sum()
            balance = balance + own * (stop - start) / bounds[-1] / len(inputs)
    loss = cross_entropy + mlp.balance_coefficient * balance + mlp.z_coefficient * z
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.item(), "router_balance": balance.item(), "router_z": z.item(), "gradients": found}


def test_the_cases_of_the_test_differ() -> None:
    whole, documents_alone = (expected(scope)["router_balance"] for scope in SCOPES)
    assert documents_alone - whole > 0.3
    assert whole > 1.05


def test_router_sums_of_microbatches_are_added_exactly() -> None:
    """float32 has not every integer above 2^24."""
    one_rank = SimpleNamespace(
        clock=SimpleNamespace(communicating=nullcontext), world=World(0, 1, 0, torch.device("cpu"))
    )
    large = 1 << 25
    parts = [
        RouterSums(
            torch.full((2, 2, 3), large + step), torch.tensor([[1.5, 0.0], [2.0, step]]), torch.tensor([step, large])
        )
        for step in (1, 2)
    ]
    sums = Engine._global_router_sums(one_rank, parts)
    assert torch.equal(sums.load, torch.full((2, 2, 3), 2 * large + 3))
    assert sums.entropy.tolist() == [[3.0, 0.0], [4.0, 3.0]]
    assert sums.dropped.tolist() == [3, 2 * large]
    assert (sums.load.dtype, sums.dropped.dtype) == (torch.int64, torch.int64)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_loss_and_gradients_are_those_of_the_whole_step(ranks: int) -> None:
    answers = run_ranks("tests.engine.moe_programs:gradients", ranks, {})
    assert answers[0]["refusal"].partition(",")[0] == (f"{ranks} ranks share a step" if ranks > 1 else "")
    for scope in SCOPES:
        truth = expected(scope)
        for number, found in zip(MICROBATCHES, answers[0][scope], strict=True):
            where = f"{scope}, {number} microbatches"
            for name in ("loss", "router_balance", "router_z"):
                assert found[name] == pytest.approx(truth[name], rel=1e-6), (where, name)
            assert found["gradients"].keys() == truth["gradients"].keys()
            for name, values in truth["gradients"].items():
                torch.testing.assert_close(torch.tensor(found["gradients"][name]), values, rtol=1e-5, atol=1e-6)
            assert found["load"] == answers[-1][scope][0]["load"], where
