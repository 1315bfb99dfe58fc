"""The ledger of a run that is killed and goes on at another world size is that of the loader."""

from __future__ import annotations

import pytest

from data_pipeline.loader.loader import Loader
from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.run.sample_lookup import RunTrace, Source
from tests.system.conftest import REPO, MakeRun, kill_group

STEPS = 14
KILLED = 8
"""A checkpoint is made every 5 steps, so the steps from 6 on are done twice."""


@pytest.mark.resume
@pytest.mark.dist
def test_a_killed_run_has_the_ledger_of_an_undisturbed_one(fork_run: MakeRun) -> None:
    mixed = REPO / "tests/system/mixed.yaml"
    words = ("ledger.every_steps=3", "data.packing.look_ahead=4")
    run = fork_run("run", 2, f"max_steps={STEPS}", *words, config=mixed)
    process = run.start()
    run.wait_for_step(process, KILLED)
    kill_group(process)
    config = load(run.folder / "config.yaml", [], RunConfig).value
    with Loader(config.data, config.media_spec, seed=config.seed) as loader:
        batches = [next(loader) for _ in range(STEPS + 2)]
    expected = [
        [(o.dataset, o.epoch, o.index) for micro in batch.microbatches for o in micro.provenance if o is not None]
        for batch in batches
    ]
    skipped = [[(skip.dataset, skip.epoch, skip.index) for skip in batch.skipped] for batch in batches]
    assert any(skipped)

    def check(first: int, last: int) -> list[Source]:
        trace, sources = RunTrace(run.folder), []
        for step in range(first, last + 1):
            found = trace.step(step)
            assert [(row.dataset, row.epoch, row.sample) for row in found.rows] == expected[step - 1], step
            if found.source is Source.LEDGER:
                left_out = sorted((record["dataset"], record["epoch"], record["index"]) for record in found.skipped)
                assert left_out == sorted(skipped[step - 1])
                assert all(row.loss is not None for row in found.rows)
            sources.append(found.source)
        return sources

    before = check(1, KILLED + 4)  # What was lost with the kill, and what is to come, is replayed.
    assert before[4] is Source.LEDGER
    assert before[-1] is Source.REPLAY
    moved = fork_run("run", 1, f"max_steps={STEPS}", *words, config=mixed)
    moved.finish()
    assert check(1, STEPS) == [Source.LEDGER] * STEPS
    assert RunTrace(run.folder).ledger.spans[:3] == [(1, 3), (4, 5), (6, 8)]
    losses = {line["step"]: line["loss"] for line in run.metrics()}
    rows = RunTrace(run.folder).step(STEPS).rows
    assert min(row.loss or 0 for row in rows) < losses[STEPS] < max(row.loss or 0 for row in rows)
