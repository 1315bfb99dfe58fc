"""Evaluation during training: it leaves training bitwise unchanged, survives restarts, and ends a run early."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import DEEP, MakeRun, Run

SETS = (
    "evaluation.sets=["
    "{name: style, manifest: examples/emoji/shards/heldout-style-quick.manifest, field: name, choices: 4, limit: 12}, "
    "{name: pages, kind: perplexity, manifest: examples/text/shards/pages-heldout.manifest, template: {kind: text}, "
    "limit: 4, max_tokens: 64}]"
)
EVERY = "evaluation.every_steps=1"
ROUTED = "model.decoder.mlp={kind: moe, expert_dim: 32, num_experts: 4, experts_per_token: 2, bias_rate: 0.01}"


def curve(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the metrics without held-out values, times and memory."""
    measured = ("seconds", "time", "goodput", "mfu", "bytes")
    return [
        {key: value for key, value in line.items() if not key.endswith(measured) and not key.startswith("heldout/")}
        for line in run.metrics()
    ]


def scores(run: Run) -> list[tuple[int, dict[str, float]]]:
    """Return the steps with held-out values, and these values."""
    found = [(line["step"], {k: v for k, v in line.items() if k.startswith("heldout/")}) for line in run.metrics()]
    return [(step, values) for step, values in found if values]


def state(run: Run, step: int) -> dict[str, Any]:
    """Return the weights, moments and data positions of a checkpoint.

    The state of torch's generator is left out: it differs between processes, and training does not use it.
    """
    folder = run.folder / f"checkpoints/step-{step:08d}"
    tensors = {path.name: path.read_bytes() for path in sorted(folder.glob("rank-*.safetensors"))}
    metadata = {path.name: json.loads(path.read_text()) | {"random_state": None} for path in folder.glob("rank-*.json")}
    assert tensors
    return tensors | metadata


def saved_steps(run: Run) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").glob("step-*"))


def record(run: Run) -> dict[str, Any]:
    """Return ``result.json``."""
    result: dict[str, Any] = json.loads((run.folder / "result.json").read_text())
    return result


@pytest.mark.dist
def test_training_is_bitwise_unchanged(fork_run: MakeRun) -> None:
    words = ("max_steps=3", SETS, "model.decoder.dropout=0.2", ROUTED, "stages.0.ema={decay: 0.9}")
    words += ("metrics.router_every=3",)
    curves = []
    for ranks, zero_stage in ((2, 3), (1, 0)):
        zero = f"engine.zero_stage={zero_stage}"
        without = fork_run(f"without-{ranks}", ranks, *words, zero)
        scored = fork_run(f"scored-{ranks}", ranks, *words, zero, EVERY)
        without.finish()
        scored.finish()
        assert curve(scored) == curve(without)
        assert "router/dead" in curve(scored)[-1]
        assert state(scored, 3) == state(without, 3)
        assert [step for step, _ in scores(scored)] == [1, 2, 3]
        assert scores(without) == []
        whole = record(scored)["heldout"]
        assert whole == record(without)["heldout"]
        last = scores(scored)[-1][1]
        assert {name: last[f"heldout/{name}/loss"] for name in whole} == {name: whole[name]["loss"] for name in whole}
        curves.append(scores(scored))
    for (_, mine), (_, theirs) in zip(*curves, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5), "the scores depend on the number of ranks"


BEST = "evaluation.best={metric: pages.loss}"


@pytest.mark.resume
@pytest.mark.slow
def test_a_restart_repeats_and_loses_no_evaluation(fork_run: MakeRun) -> None:
    words = (*DEEP, "max_steps=11", SETS, "evaluation.every_steps=2", BEST, "checkpoint={every_steps: 3, keep_last: 1}")
    # The rate is so high that the loss rises again: the best step lies in the middle.
    words += ("stages.0.learning_rate={default: 0.05}", "stages.0.schedule=constant", "stages.0.warmup_steps=0")
    whole = fork_run("whole", 1, *words)
    whole.finish()
    losses = {step: values["heldout/pages/loss"] for step, values in scores(whole)}
    assert list(losses) == [2, 4, 6, 8, 10]
    best = min(losses, key=lambda step: losses[step])
    assert 2 < best < 10, losses
    assert saved_steps(whole) == [best, 11], "the newest one, and the best"
    assert record(whole)["best"] == {
        "metric": "pages.loss",
        "value": losses[best],
        "step": best,
        "checkpoint": f"checkpoints/step-{best:08d}",
    }
    link = whole.folder / "checkpoints/best"
    assert link.readlink() == Path(f"step-{best:08d}")

    run = fork_run("killed", 1, *words)
    for kill_at, stop in ((3, signal.SIGKILL), (5, signal.SIGTERM), (9, signal.SIGKILL)):
        process = run.start(slow_from=10)
        run.wait_for_step(process, kill_at)
        process.send_signal(stop)
        process.communicate(timeout=60)
        assert not (run.folder / "result.json").exists(), "the run was over before it was killed"
    run.finish()
    assert curve(run) == curve(whole)
    assert scores(run) == scores(whole)
    assert record(run)["best"] == record(whole)["best"]
    assert saved_steps(run) == saved_steps(whole)
    assert (run.folder / "checkpoints/best").readlink() == link.readlink()


@pytest.mark.resume
def test_a_run_that_does_not_improve_ends_early_and_stays_ended(fork_run: MakeRun) -> None:
    best = "evaluation.best={metric: style.loss, min_delta: 100, stop_after: 2}"  # No loss improves by so much.
    words = ("max_steps=10", SETS, "evaluation.every_steps=2", best)
    run = fork_run("still", 1, *words)
    reason = "style.loss did not improve in 2 evaluations (evaluation.best.stop_after=2); the best is"
    assert f"the run ends at step 6 of 10: {reason}" in run.finish()
    assert [line["step"] for line in run.metrics()] == list(range(1, 7))
    result = record(run)
    assert result["steps"] == 6
    assert result["finished"]
    assert result["early_stop"]["evaluations"] == 2
    assert result["early_stop"]["reason"].startswith(reason)
    assert result["best"]["step"] == 2
    assert reason in (run.folder / "report.html").read_text()

    output = run.finish()
    assert "holds a finished run of 6 steps, which ended early (evaluation.best.stop_after): nothing to do" in output
    (run.folder / "result.json").unlink()  # As if the process had died before it wrote the file.
    assert f"the run ends at step 6 of 10: {reason}" in run.finish()
    assert record(run)["heldout"] == result["heldout"]
    assert len(run.metrics()) == 6

    longer = fork_run("still", 1, *words[:-1], best.replace("2}", "null}"))
    assert "evaluation.best.stop_after: 2 -> null" in longer.finish()
    assert [line["step"] for line in run.metrics()] == list(range(1, 11))
    assert record(run)["early_stop"] is None
