"""A run with experts logs its routers, also after a resume, and shows them in its report. A killed one resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint import list_checkpoints
from mmscale.checkpoint.reshard import CheckpointReader
from mmscale.metrics.router_log import read_router
from tests.report.pages import Page
from tests.system.conftest import REPO, MakeRun, kill_group

WORDS = [
    "model.decoder.mlp={kind: moe, expert_dim: 32, num_experts: 8, experts_per_token: 2, bias_rate: 0.01}",
    "model.connector.kind=embedding",
    "metrics.router_every=3",
]


@pytest.mark.resume
def test_a_resumed_run_counts_each_step_once(fork_run: MakeRun) -> None:
    fork_run("run", 1, *WORDS, "max_steps=5").finish()  # Its checkpoint contains two steps of the window.
    run = fork_run("run", 1, *WORDS, "max_steps=8")
    run.finish()
    lines = run.metrics()
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert [line["step"] for line in lines if "router/dead" in line] == [3, 6]
    window = read_router(run.folder)
    assert window is not None
    assert (window.first, window.last) == (4, 6)
    assert set(window.tokens.sum(1).tolist()) == {sum(line["tokens"] for line in lines[3:6])}
    assert (window.load.sum(2) == 2 * window.tokens).all()
    text, image = window.tokens[0].tolist()
    assert min(text, image) > 0
    values = lines[5]
    assert values["router/dead"] == int((window.load.sum(1) == 0).sum())
    ratios = [float(load.max() / load.mean()) for load in window.load.sum(1)]
    assert [values[f"router/{block}/max_over_mean"] for block in window.blocks] == pytest.approx(ratios)
    page = Page((run.folder / "report.html").read_text())
    assert f"steps 4 to 6 text tokens, image tokens {text:,}, {image:,}" in page.text
    assert f"{max(ratios):.2f} (block {window.blocks[ratios.index(max(ratios))]})" in page.text


STEPS = 14
RECIPE = REPO / "configs/recipes/emoji-moe.yaml"
TINY_RECIPE = [
    "model.decoder.hidden_dim=48",
    "model.decoder.mlp.expert_dim=16",
    "model.decoder.mlp.bias_rate=0.01",
    "model.vision.hidden_dim=32",
    "model.vision.num_layers=2",
    "model.vision.mlp.hidden_dim=64",
    "data.workers=0",
    "data.packing={max_tokens: 160, max_documents: 4}",
    "engine.precision=fp32",
    "engine.timeout_seconds=60",
    "evaluation.sets=[]",
    "metrics.tensorboard=false",
    f"metrics.router_every={STEPS}",
    "checkpoint.every_steps=3",
    f"max_steps={STEPS}",
]


def biases(folder: Path) -> dict[str, Tensor]:
    """Return the biases of the routers in the last checkpoint, by name."""
    with CheckpointReader(list_checkpoints(folder / "checkpoints")[-1]) as reader:
        return {name: reader.buffer(name).clone() for name in reader.manifest.buffers}


@pytest.mark.resume
@pytest.mark.dist
@pytest.mark.slow
def test_a_run_killed_on_two_ranks_and_on_one_ends_on_four_as_if_undisturbed(fork_run: MakeRun) -> None:
    whole = fork_run("whole", 2, *TINY_RECIPE, config=RECIPE)
    whole.finish()
    for ranks, kill_at in ((2, 5), (1, 9)):
        run = fork_run("killed", ranks, *TINY_RECIPE, config=RECIPE)
        process = run.start(slow_from=STEPS - 2)
        run.wait_for_step(process, kill_at)
        kill_group(process)
        assert kill_at <= run.metrics()[-1]["step"] < STEPS, "the run was over before it was killed"
    run = fork_run("killed", 4, *TINY_RECIPE, config=RECIPE)
    assert "resuming from" in run.finish()
    assert [line["step"] for line in run.metrics()] == [*range(1, STEPS + 1)]
    for mine, theirs in zip(run.metrics(), whole.metrics(), strict=True):
        for name in ("loss", "metric/router_balance"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (name, mine["step"])
        assert mine["tokens"] == theirs["tokens"]
    own, expected = biases(run.folder), biases(whole.folder)
    assert own.keys() == expected.keys()
    assert len(own) == 4, "one for each block"
    for name, values in own.items():
        assert values.any()
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0)
    window, other = read_router(run.folder), read_router(whole.folder)
    assert window is not None
    assert other is not None
    assert (window.first, window.last) == (1, STEPS)
    assert (window.tokens == other.tokens).all()
    assert (window.load == other.load).all()
    assert set(window.tokens.sum(1).tolist()) == {sum(line["tokens"] for line in run.metrics())}
