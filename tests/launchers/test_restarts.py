"""Which ends of a job lead to a restart, how many, when, and on which nodes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from launchers import STARTS_FILE, restarts
from launchers.restarts import LONGEST_DELAY_SECONDS, RESTARTS_FILE, Limits

DELAY = 50
"""Seconds before the first restart without progress."""


class FakeJob:
    """A job whose starts and ends are played through ``launchers.restarts`` with a stand-in for ``scontrol``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.run_dir = folder / "run"
        (self.run_dir / "logs").mkdir(parents=True)
        monkeypatch.setattr(restarts, "_scontrol", self.scontrol)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        self.nodes = ["n1", "n2"]
        self.start, self.checkpoint = -1, ""
        self.total, self.excluded, self.states = "9", "(null)", ""

    def scontrol(self, _show: str, what: str, *words: str) -> str:
        """Return what ``scontrol show`` prints."""
        return {
            "hostnames": words[-1].replace(",", "\n"),
            "node": self.states,
            "job": f"JobId=7 Partition=gpu ExcNodeList={self.excluded}\n",
            "partition": f"PartitionName=gpu TotalNodes={self.total}\n",
        }[what]

    def call(self, *words: str) -> tuple[str, int, str, str]:
        self.monkeypatch.setenv("SLURM_JOB_NODELIST", ",".join(self.nodes))
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(self.start))
        event, *options = words
        limits = ["--max-restarts", "3", "--delay", str(DELAY)]
        arguments = [event, str(self.run_dir), "--checkpoint", self.checkpoint, *limits, *options]
        self.monkeypatch.setattr(sys, "argv", ["restarts", *arguments])
        restarts.main()
        (line,) = self.capsys.readouterr().out.splitlines()
        action, delay, nodes, reason = line.split(" ", 3)
        return action, int(delay), nodes, reason

    def begin(self) -> tuple[str, int, str, str]:
        self.start += 1
        return self.call("begin")

    def end(
        self, code: int, *exits: tuple[int, str, int], saves: str = "", stopped: bool = False
    ) -> tuple[str, int, str, str]:
        """End a start. ``exits`` has rank, node and code of each failed rank, in the order in which they ended."""
        before, self.checkpoint = self.checkpoint, saves or self.checkpoint
        folder = self.folder / "ended"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for order, (rank, node, failed) in enumerate(exits):
            (folder / str(rank)).write_text(f"{failed} {node}\n")
            os.utime(folder / str(rank), (order, order))
        marker = self.folder / "stopped"
        marker.unlink(missing_ok=True)
        if stopped:
            marker.touch()
        return self.call(
            "end", "--code", str(code), "--before", before, "--stopped", str(marker), "--exits", str(folder)
        )

    def plays(
        self, code: int, *exits: tuple[int, str, int], saves: str = "", stopped: bool = False
    ) -> Sequence[object]:
        """One start and its end. Return the decision."""
        assert self.begin()[0] == "run"
        return self.end(code, *exits, saves=saves, stopped=stopped)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> FakeJob:
    return FakeJob(tmp_path, monkeypatch, capsys)


def test_the_number_of_restarts_without_a_newer_checkpoint_is_bounded(job: FakeJob) -> None:
    decisions = [job.plays(1) for _ in range(3)]
    assert [decision[0] for decision in decisions] == ["requeue"] * 3
    assert [decision[1] for decision in decisions] == [DELAY * 2**n for n in range(3)], "back-off"
    assert job.plays(1, saves="9.0 step-5")[:2] == ("requeue", 0), "a newer checkpoint"
    assert [job.plays(1)[0] for _ in range(4)] == ["requeue", "requeue", "requeue", "end"]


def test_the_delay_stops_growing() -> None:
    history = restarts.History(failures=60)
    assert restarts.decide_end(history, restarts.End(1), Limits(100, DELAY)).delay == LONGEST_DELAY_SECONDS


def test_a_run_that_always_saves_restarts_without_end(job: FakeJob) -> None:
    for step in range(10):
        assert job.plays(137, saves=f"{step}.0 step-{step}")[:2] == ("requeue", 0)


def test_checkpoints_of_another_job_are_no_progress(job: FakeJob) -> None:
    """A rank that gets the lock of the run folder adds a line to the file of starts."""
    starts = job.run_dir / STARTS_FILE
    starts.parent.mkdir()
    starts.write_text("{}\n")
    decisions = [job.plays(1, saves=f"{step}.0 step-{step}") for step in range(3)]
    assert [decision[:2] for decision in decisions] == [("requeue", DELAY * 2**n) for n in range(3)]
    job.checkpoint = "4.0 step-4"
    assert job.plays(1, saves="5.0 step-5")[0] == "end"

    job.begin()
    starts.write_text("{}\n{}\n")
    assert job.end(1, saves="6.0 step-6")[:2] == ("requeue", 0)


def test_a_stop_without_a_checkpoint_counts_too(job: FakeJob) -> None:
    assert job.plays(0, saves="1.0 step-1", stopped=True)[:2] == ("requeue", 0)
    assert [job.plays(0, stopped=True)[0] for _ in range(4)] == ["requeue", "requeue", "requeue", "end"]


@pytest.mark.parametrize(
    ("code", "exits", "action"),
    [
        (2, (), "end"),
        (2, ((0, "n1", 2), (1, "n2", 2)), "end"),
        (137, ((0, "n1", 2), (1, "n2", 137)), "end"),
        (2, ((1, "n2", 1), (0, "n1", 2)), "requeue"),
        (0, (), "end"),
        (76, ((0, "n1", 76),), "requeue"),
    ],
)
def test_only_wrong_use_and_a_missing_result_never_restart(
    job: FakeJob, code: int, exits: tuple[tuple[int, str, int], ...], action: str
) -> None:
    assert job.plays(code, *exits, saves="1.0 step-1")[0] == action


def test_a_node_that_failed_twice_is_excluded(job: FakeJob) -> None:
    first = job.plays(137, (1, "n2", 137), (0, "n1", 1), saves="1.0 a")
    assert "rank 1 on n2 was killed by SIGKILL" in str(first[3])
    assert first[2] == "-"
    assert job.plays(139, (0, "n1", 139), saves="2.0 b")[2] == "-", "another node"
    assert job.plays(1, (0, "n2", 1), saves="3.0 c")[2] == "-", "no fault of the node"
    second = job.plays(137, (1, "n2", 137), saves="4.0 d")
    assert second[:3] == ("requeue", 0, "n2")
    assert str(second[3]).endswith("without n2")


def test_nodes_that_are_excluded_stay_excluded(job: FakeJob) -> None:
    job.excluded = "n4,n5"
    job.plays(137, (1, "n2", 137), saves="1.0 a")
    assert job.plays(137, (1, "n2", 137), saves="2.0 b")[2] == "n2,n4,n5"


@pytest.mark.parametrize(("total", "excluded"), [("3", "n2"), ("2", "-"), ("", "-")])
def test_a_job_that_could_not_start_without_a_node_keeps_it(job: FakeJob, total: str, excluded: str) -> None:
    job.total = total
    job.plays(137, (1, "n2", 137), saves="1.0 a")
    assert job.plays(137, (1, "n2", 137), saves="2.0 b")[:3] == ("requeue", 0, excluded)


def test_the_node_of_a_stopped_rank_is_to_blame_for_a_hang(job: FakeJob) -> None:
    (job.run_dir / "heartbeats").mkdir()
    (job.run_dir / "heartbeats/verdict.json").write_text('{"rank": 0, "silent_nodes": ["n2", "n 3", 4]}')
    exits = ((0, "n1", 76), (1, "n2", 1))
    assert "the rank on n2 does not run" in str(job.plays(76, *exits, saves="1.0 a")[3])
    assert job.plays(76, *exits, saves="2.0 b")[2] == "n2"


def down(node: str, state: str = "DOWN+NOT_RESPONDING", booted: str = "2000-01-01T00:00:00") -> str:
    return f"NodeName={node} State={state} BootTime={booted} Reason=Not responding\n"


def test_a_node_that_went_down_is_found_at_the_next_start(job: FakeJob) -> None:
    """SLURM ends the script together with its node, so there is no record of the end."""
    up = down("n1", "ALLOCATED")
    assert job.begin()[0] == "run"
    job.states = up + down("n2")
    assert job.begin()[0] == "run"
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 100))
    job.states = up + down("n2", "IDLE", booted=soon)
    job.nodes = ["n2", "n3"]
    assert job.begin()[:3] == ("requeue", 0, "n2"), "it failed twice, and the job has got it again"
    assert job.begin()[0] == "run", "the requeue did not exclude it; the job must not be requeued for ever"
    job.states = up
    assert job.end(1)[:3] == ("requeue", 4 * DELAY, "n2"), "the third failure"


@pytest.mark.parametrize("state", ["IDLE*", "DOWN", "ALLOCATED+NOT_RESPONDING", "IDLE+FAIL"])
def test_states_of_a_node_that_failed(job: FakeJob, state: str) -> None:
    job.states = down("n1", "IDLE+DRAIN") + down("n2", state)
    assert "SLURM reports n2 as down" in str(job.plays(1, (0, "n1", 1))[3])


def test_a_preemption_is_no_failure(job: FakeJob) -> None:
    for _ in range(10):
        assert job.begin()[0] == "run"
    assert job.end(1)[1] == DELAY, "the first failure"


def full_disk(path: Path) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_restarts_are_bounded_on_a_full_disk(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record can be written. SLURM's own count of restarts bounds them."""
    monkeypatch.setattr(restarts, "append_regular", full_disk)
    job.checkpoint = "1.0 step-1"
    assert [job.plays(1)[0] for _ in range(4)] == ["requeue", "requeue", "requeue", "end"]


def test_damaged_records_and_those_of_other_jobs_are_left_out(job: FakeJob) -> None:
    lines = ["", "[1]", "{", '{"job": "7"}', '{"job": "7", "start": "x", "checkpoint": 3}', "null", '"7"']
    other = {"job": "6", "start": 0, "checkpoint": "", "event": "end", "counts": True, "failed": ["n2"]}
    (job.run_dir / RESTARTS_FILE).write_text("\n".join([*lines, *[json.dumps(other)] * 9, '{"torn"']))
    assert job.plays(137, (1, "n2", 137))[:3] == ("requeue", DELAY, "-")
    records = (job.run_dir / RESTARTS_FILE).read_text().splitlines()
    assert [json.loads(line)["event"] for line in records[-2:]] == ["begin", "end"]


def test_every_sequence_of_ends_stays_within_the_bound() -> None:
    """Brute force: whatever happens, no four failures without a newer checkpoint in a row lead to another restart."""
    for ends in itertools.product([True, False], repeat=8):
        history, in_row = restarts.History(), 0
        for start, saves in enumerate(ends):
            checkpoint = f"{start}.0 x" if saves else history.checkpoint
            record = {"start": start, "checkpoint": checkpoint, "event": "end", "counts": not saves, "failed": []}
            history.add(record)
            in_row = 0 if saves else in_row + 1
            decision = restarts.decide_end(history, restarts.End(1), Limits(3, DELAY))
            assert (decision.action == "requeue") == (in_row <= 3)
            assert re.search(r"requeued \(|max-restarts is 3", decision.reason)
