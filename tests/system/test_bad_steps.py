"""Whole runs with bad steps: the rejected steps, the files about them, and the data that a roll back skips."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.loader.loader import Loader
from mmscale.bad_steps.roll_back import effective_roll_backs, read_roll_backs
from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.run.sample_lookup import Evidence, SampleLookup
from tests.system.conftest import DEEP, MakeRun, Run, kill_group
from tests.system.test_evaluation import SETS, record, scores

STEPS = 24
# Too strict for a real run: some steps of any curve count as spikes.
STRICT = "norm_deviations: 1, window_steps: 8, min_steps: 4, roll_back_steps: 3, max_in_row: 8"


def curve(run: Run) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "applied", "bad_steps", "roll_backs")
    return [tuple(line[name] for name in names) for line in run.metrics()]


def spikes(norms: list[float]) -> list[bool]:
    """Return the bad steps by the formula, from the curve."""
    found = []
    for number, norm in enumerate(norms):
        logs = np.log(norms[max(0, number - 8) : number])
        limit = np.inf
        if len(logs) >= 4:
            spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
            limit = np.exp(np.median(logs) + max(spread, 0.05))
        found.append(bool(norm > limit))
    return found


@pytest.mark.resume
@pytest.mark.dist
@pytest.mark.slow
def test_spikes_are_skipped_by_the_formula_and_their_samples_are_named(fork_run: MakeRun) -> None:
    words = (*DEEP, f"max_steps={STEPS}", f"bad_steps={{{STRICT}}}")
    run = fork_run("whole", 2, *words)
    run.finish()
    lines = run.metrics()
    refused = [not line["applied"] for line in lines]
    assert refused == spikes([line["grad_norm"] for line in lines])
    assert 1 <= sum(refused) < 8
    assert [line["bad_steps"] for line in lines] == np.cumsum(refused).tolist()
    lookup = SampleLookup(run.folder)
    bad = [line["step"] for line in lines if not line["applied"]]
    assert sorted(path.name for path in (run.folder / "bad_steps").iterdir()) == [f"step-{n:08d}.json" for n in bad]
    for step in bad:
        record = json.loads((run.folder / "bad_steps" / f"step-{step:08d}.json").read_text())
        assert record["loss"] == lines[step - 1]["loss"]
        assert record["grad_norm"] == lines[step - 1]["grad_norm"] > record["thresholds"]["grad_norm"]
        rows = {(d["lane"], d["place"]): d for d in record["documents"]}
        known = {(row.lane, row.place): row for row in lookup.samples_of(step).rows}
        assert rows.keys() == known.keys()
        for place, row in known.items():
            found = rows[place]
            assert (found["dataset"], found["epoch"], found["index"], found["tokens"]) == (
                *(row.dataset, row.epoch, row.sample),
                row.tokens,
            )
            assert found["loss"] == pytest.approx(row.loss, rel=1e-6)
        losses = [document["loss"] for document in record["documents"]]
        assert losses == sorted(losses, reverse=True)
    # The checkpoint contains the detector's state: after a kill, the same steps are rejected.
    killed = fork_run("killed", 2, *words)
    process = killed.start()
    killed.wait_for_step(process, 17)
    kill_group(process)
    killed.finish()
    assert curve(killed) == curve(run)


@pytest.mark.resume
@pytest.mark.dist
@pytest.mark.slow
def test_a_roll_back_leaves_out_the_data_and_outlives_a_kill(fork_run: MakeRun) -> None:
    strict = STRICT.replace("norm_deviations: 1,", "norm_deviations: 1.6,")
    bad_steps = f"bad_steps={{policy: roll_back, {strict}}}"
    words = (*DEEP, f"max_steps={STEPS}", bad_steps, "sample_log.every_steps=4", "model.decoder.dropout=0.1")
    words += (SETS, "evaluation.every_steps=3", "evaluation.best={metric: pages.loss}")
    run = fork_run("whole", 2, *words)
    assert "going back to step" in run.finish()
    roll_backs = read_roll_backs(run.folder / "bad_steps")
    assert roll_backs
    check_sample_log(run, 1, STEPS)
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["applied"] for line in lines), "every step of the last line of checkpoints is a good one"
    assert lines[-1]["roll_backs"] == len(roll_backs)
    losses = {step: values["heldout/pages/loss"] for step, values in scores(run)}
    assert list(losses) == list(range(3, STEPS + 1, 3)), "no evaluation of an abandoned step is left, none is missing"
    best = record(run)["best"]
    assert (best["step"], best["value"]) == min(losses.items(), key=lambda item: item[1])
    assert (run.folder / best["checkpoint"]).is_dir()

    killed = fork_run("killed", 2, *words)
    listed = killed.folder / "bad_steps" / "roll_backs.json"
    seen = 0
    while seen < len(roll_backs):  # Kill the run as soon as a roll back is recorded, before it takes effect.
        process = killed.start()
        while process.poll() is None and count(listed) <= seen:
            time.sleep(0.001)
        kill_group(process)
        assert count(listed) > seen
        seen = count(listed)
        check_sample_log(killed, 1, STEPS)
    killed.finish()
    assert read_roll_backs(killed.folder / "bad_steps") == roll_backs
    assert scores(killed) == scores(run)
    assert record(killed)["best"] == best
    assert curve(killed) == curve(run)


def count(path: Path) -> int:
    return len(json.loads(path.read_text())) if path.exists() else 0


def check_sample_log(run: Run, first: int, last: int) -> None:
    """Each step has the loader's next batch, except after a roll back; sample log, replay and metrics agree."""
    config = load(run.folder / "config.yaml", [], RunConfig).value
    roll_backs = effective_roll_backs(read_roll_backs(run.folder / "bad_steps"))
    jumps = {entry.to_step: json.loads(entry.loader)["step"] for entry in roll_backs}
    fed, position = {}, 0
    for step in range(1, last + 1):
        position = jumps.get(step - 1, position) + 1
        fed[step] = position
    with Loader(config.data, config.media_spec, seed=config.seed) as loader:
        batches = [next(loader) for _ in range(position)]
    lookup = SampleLookup(run.folder)
    sources = set()
    for step in range(first, last + 1):
        batch = batches[fed[step] - 1]
        expected = [(o.dataset, o.epoch, o.index) for m in batch.microbatches for o in m.provenance if o is not None]
        found = lookup.samples_of(step)
        assert [(row.dataset, row.epoch, row.sample) for row in found.rows] == expected, (step, found.source)
        sources.add(found.source)
    assert Evidence.SAMPLE_LOG in sources


@pytest.mark.fault
def test_halting_names_the_step_and_too_many_in_a_row_end_the_run(fork_run: MakeRun) -> None:
    halted = fork_run("halted", 1, *DEEP, f"max_steps={STEPS}", f"bad_steps={{policy: halt, {STRICT}}}")
    output = halted.finish(code=1)
    last = halted.metrics()[-1]
    assert not last["applied"]
    assert f"step {last['step']}: the gradient norm" in output
    assert "bad_steps.policy=halt" in output
    assert "Traceback" not in output
    assert (halted.folder / "bad_steps" / f"step-{last['step']:08d}.json").exists()

    # A learning rate that makes every later loss NaN or infinite.
    broken = fork_run("broken", 1, "max_steps=12", "bad_steps.max_in_row=3", "stages.0.learning_rate={default: 1e30}")
    output = broken.finish(code=1)
    assert "bad step 4 in a row (bad_steps.max_in_row=3)" in output
    lines = broken.metrics()
    assert [line["applied"] for line in lines[-5:]] == [True, False, False, False, False]
