"""The state of a run from its files, with a real process that holds the lock and with files of another machine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmscale.cli.launch_run import app
from mmscale.engine.watchdog import HEARTBEATS, Heartbeat, heartbeat_path
from mmscale.errors import LaunchError
from mmscale.io.lock import Holder
from mmscale.report.starts import StartRecord, add_start
from mmscale.run.outcome import RunOutcome, recorded_outcome
from mmscale.run.status import SlowNode, read_status, slow_nodes

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    number: str
    state: str
    reason: str = ""
    is_pending: bool = False


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder whose lock a living process of this machine holds."""
    folder = tmp_path_factory.mktemp("held")
    command = [sys.executable, "-m", "tests.run.holder", str(folder)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()


def beat(
    folder: Path,
    rank: int,
    *,
    age: float = 0.0,
    count: int = 1,
    phase: str = "forward",
    collective: str = "",
    **more: object,
) -> None:
    path = heartbeat_path(folder, rank)
    path.parent.mkdir(exist_ok=True)
    values = {
        "count": count,
        "step": 7,
        "phase": phase,
        "seconds": 2.5,
        "collective": collective,
        "place": "a.py:1 in f",
        **more,
    }
    path.write_text(json.dumps(values))
    os.utime(path, (time.time() - age,) * 2)


@contextmanager
def renewed(renew: Callable[[int], None]) -> Iterator[None]:
    """Call ``renew`` with 2, 3, ... again and again, as a living process does. One call could come before the watch."""
    ended = threading.Event()

    def live() -> None:
        for count in itertools.count(2):
            if ended.wait(0.6):
                return
            renew(count)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def record_start(folder: Path, number: int, world_size: int, host: str = "elsewhere") -> None:
    values = {"start": number, "time": "", "step": 0, "world_size": world_size, "config": "starts/config-0001.yaml"}
    rest = {"changed": {}, "versions": {}, "code": "", "commit": None, "commit_changed": None, "host": host, "pid": 1}
    add_start(folder, StartRecord(**values, **rest))  # type: ignore[arg-type]


def end(folder: Path, outcome: str, message: str = "") -> None:
    with recorded_outcome(folder, True) as outcomes:
        outcomes.append(RunOutcome(outcome=outcome, message=message))  # type: ignore[arg-type]


def test_a_run_on_this_machine(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = holder
    beat(folder, 0)
    beat(folder, 1, age=3)
    (folder / "config.yaml").write_text("max_steps: 40\nstages:\n- {name: a, steps: 30}\n- {name: b, steps: 20}\n")
    lines = [{"step": step, "seconds": 1.5, "checkpoint_seconds": step % 2} for step in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 11, "sec')
    for step in (5, 10):
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    manifest = folder / "checkpoints/step-00000005/manifest.json"  # Step 10 is not complete.
    manifest.touch()
    os.utime(manifest, (time.time() - 600,) * 2)
    found = read_status(folder)
    assert (found.state, found.step, found.total_steps, found.checkpoint_step) == ("running", 10, 40, 5)
    assert found.seconds_per_step == pytest.approx(2.0)  # 1.5 s, and 1 s for each second step.
    assert found.seconds_left == pytest.approx(60.0)
    assert found.checkpoint_age_seconds == pytest.approx(600, abs=60)
    assert found.ages == "this machine"
    assert found.holder is not None
    assert f"process {process.pid} on" in found.holder
    assert [(rank.rank, rank.step, rank.phase_seconds) for rank in found.ranks] == [(0, 7, 2.5), (1, 7, 2.5)]


def test_a_silent_rank_is_hung_only_if_its_file_does_not_change_while_it_is_watched(
    holder: tuple[Path, subprocess.Popen[str]],
) -> None:
    folder, _ = holder
    beat(folder, 0, collective="all_reduce")
    beat(folder, 1, age=100)
    found = read_status(folder, watch_seconds=1)
    assert found.state == "hung"
    assert "rank 1 does not run any more" in found.reason
    with renewed(lambda count: beat(folder, 1, age=100, count=count)):  # Alive, with a clock that is wrong.
        assert read_status(folder, watch_seconds=20).state == "running"


def test_slow_ranks_are_named_with_their_nodes(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    def of(rank: int, seconds: float | None) -> Heartbeat:
        return Heartbeat(1, 7, "data", 0.1, "", "", f"n{rank // 4}", seconds)

    times = [1.0, 1.1, 0.9, 1.29, *(1.0, 3.0, 1.0, 2.0), *(None, 1.0, 1.0, 0.0)]
    beats = {rank: of(rank, seconds) for rank, seconds in enumerate(times)}
    (slow,) = slow_nodes(beats)
    assert (slow.node, slow.ranks, slow.num_ranks, slow.factor) == ("n1", (5, 7), 4, 2.5)
    assert str(slow) == "node n1: ranks 5, 7, 2.5 times the median"
    assert slow_nodes({0: of(0, 1.0), 9: of(9, 1.5)}) == (SlowNode("n2", (9,), 1, 1.5),), "two ranks: the slower one"
    assert slow_nodes({0: of(0, 1.0)}) == slow_nodes({}) == ()
    folder, _ = holder
    beat(folder, 0, own_seconds=2.0, node="n7")
    beat(folder, 1, own_seconds=1.0)
    found = read_status(folder)
    assert (found.state, [str(node) for node in found.slow_nodes]) == (
        "running",
        ["node n7: rank 0, 2.0 times the median"],
    )
    result = CliRunner().invoke(app, ["status", str(folder)])
    assert "slow" in result.output
    assert "node n7: rank 0, 2.0 times the median" in result.output


def test_a_verdict_of_the_watchdog(holder: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, _ = holder
    beat(folder, 0, collective="all_reduce")
    beat(folder, 1)
    verdict = folder / HEARTBEATS / "verdict.json"
    verdict.write_text("{}")
    found = read_status(folder)
    verdict.unlink()
    assert found.state == "hung"
    assert "rank 1 has been in forward of step 7" in found.reason


def test_states_without_a_process(tmp_path: Path) -> None:
    waiting = [Job("8", "PENDING", "BeginTime", True)]
    assert read_status(tmp_path).state == "never started"
    assert read_status(tmp_path, waiting).reason == "job 8 is PENDING (BeginTime)"
    running = read_status(tmp_path, [Job("7", "RUNNING"), *waiting])
    assert (running.state, "has not taken the run folder yet" in running.reason) == ("running", True)
    record_start(tmp_path, 1, 2)
    record_start(tmp_path, 2, 2)
    killed = read_status(tmp_path)
    assert (killed.state, killed.restarts, killed.world_size) == ("failed", 1, 2)
    assert "without a record" in killed.reason
    end(tmp_path, "failed", "shard a.tar is damaged")
    assert (read_status(tmp_path).state, read_status(tmp_path).reason) == ("failed", "shard a.tar is damaged")
    end(tmp_path, "stopped", "signal SIGUSR1")
    assert read_status(tmp_path).state == "stopped"
    assert read_status(tmp_path, waiting).state == "queued"
    end(tmp_path, "finished")
    assert read_status(tmp_path, waiting).state == "finished", "the rest of a chain waits"
    with pytest.raises(LaunchError, match="no such run folder"):
        read_status(tmp_path / "gone")


def test_a_finished_run_of_an_older_version(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "seconds": 1.0}\n')
    (tmp_path / "config.yaml").write_text("stages: [{steps: 4}]\n")
    assert read_status(tmp_path).state == "finished"
    (tmp_path / "config.yaml").write_text("stages: [{steps: 5}]\n")
    assert read_status(tmp_path).state == "failed"


def test_a_run_on_another_machine_lives_if_it_renews_its_claim(tmp_path: Path) -> None:
    """The other machine's clock is an hour ahead. No age may be computed from it and this machine's clock."""
    record_start(tmp_path, 1, 1)
    claim = tmp_path / "lock/claim-00000001"
    claim.parent.mkdir()
    (tmp_path / "lock/kernel").touch()
    theirs = Holder.of_this_process(False).model_copy(update={"machine": "other", "host": "n7", "kernel_lock": False})
    claim.write_text(theirs.model_dump_json())
    ahead = time.time() + 3600
    os.utime(claim, (ahead, ahead))
    beat(tmp_path, 0, age=-3596)
    dead = read_status(tmp_path, watch_seconds=1)
    assert (dead.state, dead.ages) == ("failed", "newest file of the run")
    assert "does not renew its lock" in dead.reason
    assert dead.ranks[0].age_seconds == pytest.approx(4, abs=2)
    assert read_status(tmp_path, [Job("7", "RUNNING")], watch_seconds=0).state == "hung"
    with renewed(lambda count: os.utime(claim, (ahead + count, ahead + count))):
        assert read_status(tmp_path, watch_seconds=20).state == "running"


@pytest.mark.parametrize(
    "files",
    [
        {
            "metrics.jsonl": "[[[",
            "config.yaml": "stages: 3",
            "starts/outcome.json": "{}",
            "heartbeats/rank-00000": "[]",
        },
        {"config.yaml": "stages: [{steps: a}]", "metrics.jsonl": '{"step": 1, "seconds": "x"}\n'},
        {"config.yaml": ": :", "heartbeats/rank-00000": '{"count": "a"}', "metrics.jsonl": '{"step": -1}\n'},
    ],
)
def test_damaged_files_are_left_out(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints/step-00000001")
    found = read_status(tmp_path)
    assert (found.seconds_per_step, found.total_steps, found.ranks, found.checkpoint_step) == (None, None, (), None)
