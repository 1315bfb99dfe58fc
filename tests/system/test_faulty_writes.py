"""A run whose writes fail for a while, or find a full disk, ends with the weights of an undisturbed run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from benchmarks.torture import differences
from mmscale.checkpoint import find_latest, verify
from tests.engine.fork_server import fork_server
from tests.system import faulty_writes
from tests.system.conftest import MakeRun, kill_group
from tests.system.test_resume import curve

WORDS = (
    "max_steps=10",
    "checkpoint.every_steps=3",
    "data.lanes=2",
    "model.decoder.dropout=0.1",
    "model.decoder.num_layers=2",
    "model.vision.num_layers=1",
    "model.connector.every=2",
    "engine.watchdog={step_seconds: 30, other_seconds: 300}",
)
LOST = ("", errno.EIO, 3, 17)
"""Two of 17 successive writes of a process fail, as while a file server restarts."""


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.resume
def test_faulty_writes_change_no_value(fork_run: MakeRun, tmp_path: Path) -> None:
    whole = fork_run("whole", 1, *WORDS)
    whole.finish()
    run = fork_run("run", 1, *WORDS)
    starts = [
        # No heartbeat is ever written. The disk is full during the second checkpoint.
        (1, [("heartbeats/", errno.ENOSPC, 1, 0), ("step-00000006.partial/", errno.ENOSPC, 2, 0), LOST]),
        # The disk is full when the seventh line of the metrics, or one soon after it, is written.
        (1, [("/metrics.jsonl", errno.ENOSPC, 7, 0)]),
        (
            0,
            [("heartbeats/", errno.EIO, 1, 0), ("/metrics.jsonl", errno.EIO, 3, 5), ("checkpoints/", errno.EIO, 3, 17)],
        ),
    ]
    for number, (code, rules) in enumerate(starts):
        log = tmp_path / f"faults-{number}"
        variables = faulty_writes.environment(tmp_path / f"site-{number}", run.folder, log, *rules)
        call, said = "tests.system.faulty_writes:run_command", tmp_path / f"said-{number}"
        process = fork_server(number % 2).fork(call, [run.words], {**os.environ, **variables}, said)
        try:
            output, _ = process.communicate(timeout=200)
        finally:
            kill_group(process)
        assert process.returncode == code, output
        hits = {int(line.split()[0]) for line in log.read_text().splitlines()}
        assert hits == {*range(len(rules))}, "every kind of fault happened"
        saved = find_latest(run.folder / "checkpoints")
        assert saved is not None
        assert verify(saved) == []
        assert ("No space left on device; free space" in output) == (code == 1)
        # The second start may end before its background writer has completed step 6.
        assert saved.name in (["step-00000003"], ["step-00000003", "step-00000006"], ["step-00000010"])[number]
    assert curve(run) == curve(whole)
    assert differences(whole.folder, run.folder) == (0.0, 0.0)
