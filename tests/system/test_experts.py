"""A run with experts logs its routers, also after a resume, and shows them in its report."""

from __future__ import annotations

import pytest

from mmscale.metrics.router_log import read_router
from tests.report.pages import Page
from tests.system.conftest import MakeRun

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
