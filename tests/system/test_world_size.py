"""The loss curve is the same at 1, 2 and 4 ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.loader.loader import Loader
from mmscale.checkpoint import TrainState, save
from mmscale.config import load
from mmscale.models.build import build_model
from mmscale.objectives.next_token import NextToken
from mmscale.run.config import RunConfig
from tests.checkpoint.plain_engine import plain_engine
from tests.engine.moe_programs import sharpen_
from tests.system.conftest import TINY, MakeRun

STEPS = 12
MIXED = Path(__file__).with_name("mixed.yaml")
"""Images, interleaved documents and text, so that packs differ in length and some have no image. With dropout."""
EXPERTS = 8
ROUTED = (
    "model.decoder.mlp={kind: moe, every: 2, dense: {hidden_dim: 64}, expert_dim: 32, "
    f"num_experts: {EXPERTS}, experts_per_token: 2, "
    "bias_rate: 0.02, balance_coefficient: 0.1, z_coefficient: 0.01}",
    "engine.micro_lanes=2",
    f"metrics.router_every={STEPS}",
)
"""Experts in every second block. 1, 2 and 4 ranks have two microbatches of two packs, one of two, and one of one."""


def test_the_mixture_has_steps_in_which_one_rank_has_no_image() -> None:
    config = load(MIXED, [], RunConfig).value
    loader = iter(Loader(config.data, config.media_spec, seed=config.seed))
    real_images, weights = [], []
    for _ in range(STEPS):
        microbatches = next(loader).microbatches
        weights.append([microbatch.weight for microbatch in microbatches])
        # A dummy pack's image belongs to a segment without provenance.
        real_images.append(
            [
                sum(batch.provenance[segment] is not None for _, segment in batch.pairs.tolist())
                for batch in microbatches
            ]
        )
    assert any(0 in images and max(images) > 0 for images in real_images)
    assert any(len(set(row)) > 1 for row in weights)


@pytest.mark.dist
def test_loss_curve_is_the_same_at_one_two_and_four_ranks(fork_run: MakeRun, tmp_path: Path) -> None:
    """Train from routers that are as far from equal probabilities as trained ones."""
    config = load(MIXED, ROUTED, RunConfig).value
    model = build_model(config.model, seed=config.seed)
    sharpen_(model)
    start = save(plain_engine(model), TrainState(0, 0, 0), tmp_path)
    words = (*ROUTED, f"max_steps={STEPS}", f"stages.0.weights=[{{checkpoint: {start}}}]")
    curves = {}
    for ranks in (1, 2, 4):
        run = fork_run(f"world-{ranks}", ranks, *words, config=MIXED)
        run.finish()
        curves[ranks] = run.metrics()
    assert len(curves[1]) == STEPS
    entropies = [value for name, value in curves[1][-1].items() if name.endswith("/entropy")]
    assert max(entropies) < 0.6 * math.log(EXPERTS)
    for ranks in (2, 4):
        for one, many in zip(curves[1], curves[ranks], strict=True):
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-5), (ranks, one["step"])
            assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4), (ranks, one["step"])
            assert many["metric/router_balance"] == pytest.approx(one["metric/router_balance"], rel=1e-5), (
                ranks,
                one["step"],
            )
            assert many["tokens"] == one["tokens"]


def test_each_step_has_the_masks_of_its_number(fork_run: MakeRun) -> None:
    """At a learning rate near 0, a run has the losses of its initial model with the dropout masks of its steps."""
    words = ("max_steps=3", "stages.0.learning_rate={default: 1e-30}", "model.decoder.dropout=0.3")
    run = fork_run("still", 1, *words, config=MIXED)
    run.finish()
    config = load(run.folder / "config.yaml", [], RunConfig).value
    model, objective = build_model(config.model, seed=config.seed), NextToken()
    with Loader(config.data, config.media_spec, seed=config.seed) as loader, torch.no_grad():
        for line, step in zip(run.metrics(), loader, strict=False):
            batches = [replace(b, dropout_key=(config.seed, step.step)) for b in step.microbatches]
            loss = sum(objective(model, batch).loss_sum.item() for batch in batches) / sum(b.weight for b in batches)
            assert line["loss"] == pytest.approx(loss, rel=1e-5), step.step


@pytest.mark.dist
def test_a_world_that_does_not_fit_is_refused(fork_run: MakeRun) -> None:
    run = fork_run("unfit", 2, "data.lanes=1", config=TINY)
    output = run.finish(code=2)
    assert "world size 2 does not fit data.lanes=1" in output
    assert not run.folder.joinpath("checkpoints").exists()
