"""The sample log of a run that is killed and resumed at another world size matches the loader."""

from __future__ import annotations

import pytest

from data_pipeline.loader.loader import Loader
from mmscale.config import load
from mmscale.run.config import RunConfig
from mmscale.run.sample_lookup import Evidence, SampleLookup
from tests.system.conftest import REPO, MakeRun, kill_group

STEPS = 14
KILLED = 8
"""The run saves every 5 steps, so it repeats the steps from 6 on."""


@pytest.mark.resume
@pytest.mark.dist
def test_a_killed_run_has_the_sample_log_of_an_undisturbed_one(fork_run: MakeRun) -> None:
    mixed = REPO / "tests/system/mixed.yaml"
    words = ("sample_log.every_steps=3", "data.packing.look_ahead=4")
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

    def check(first: int, last: int) -> list[Evidence]:
        lookup, sources = SampleLookup(run.folder), []
        for step in range(first, last + 1):
            found = lookup.samples_of(step)
            assert [(row.dataset, row.epoch, row.sample) for row in found.rows] == expected[step - 1], step
            if found.source is Evidence.SAMPLE_LOG:
                left_out = sorted((record["dataset"], record["epoch"], record["index"]) for record in found.skipped)
                assert left_out == sorted(skipped[step - 1])
                assert all(row.loss is not None for row in found.rows)
            sources.append(found.source)
        return sources

    before = check(1, KILLED + 4)  # The rows that the kill lost, and later steps, are replayed.
    assert before[4] is Evidence.SAMPLE_LOG
    assert before[-1] is Evidence.REPLAY
    moved = fork_run("run", 1, f"max_steps={STEPS}", *words, config=mixed)
    moved.finish()
    assert check(1, STEPS) == [Evidence.SAMPLE_LOG] * STEPS
    assert SampleLookup(run.folder).sample_log.step_ranges[:3] == [(1, 3), (4, 5), (6, 8)]
    losses = {line["step"]: line["loss"] for line in run.metrics()}
    rows = SampleLookup(run.folder).samples_of(STEPS).rows
    assert min(row.loss or 0 for row in rows) < losses[STEPS] < max(row.loss or 0 for row in rows)
