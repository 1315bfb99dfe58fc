"""The same recipe with every connector and with experts trains on two ranks under ZeRO-3."""

from __future__ import annotations

from statistics import mean

import pytest

from tests.system.conftest import MakeRun

MOE = [
    "model.decoder.mlp.kind=moe",
    "model.decoder.mlp.num_experts=16",
    "model.decoder.mlp.experts_per_token=4",
    "model.decoder.mlp.expert_dim=32",
]


@pytest.mark.dist
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model.connector.kind=embedding"], marks=pytest.mark.slow),
        pytest.param(["model.connector.kind=hybrid"], marks=pytest.mark.slow),
        pytest.param(MOE, marks=pytest.mark.slow),
    ],
    ids=["embedding", "hybrid", "moe"],
)
def test_trains_thirty_steps(fork_run: MakeRun, overrides: list[str]) -> None:
    run = fork_run("run", 2, "max_steps=30", "stages.0.learning_rate.default=3e-3", *overrides)
    run.finish()
    losses = [line["loss"] for line in run.metrics()]
    assert len(losses) == 30
    assert mean(losses[-10:]) < 0.8 * mean(losses[:5])
