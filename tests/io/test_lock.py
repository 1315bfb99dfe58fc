"""The lock of a run folder has one holder: after crashes, in races, and on machines that share no kernel locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmscale.cli.main import main
from mmscale.dist import World
from mmscale.errors import LaunchError
from mmscale.io import lock as lock_module
from mmscale.io.lock import FolderLock, Holder
from mmscale.run.folder import hold_folder
from tests.engine.ranks import ROOT, run_ranks

TINY = ROOT / "tests/system/tiny.yaml"

HOLDER = """
import os, sys, time
from pathlib import Path
from mmscale.io import lock
from mmscale.errors import LaunchError
lock.BEAT_SECONDS = 0.2
folder, mode = Path(sys.argv[1]), sys.argv[2]
held = lock.FolderLock(folder)
print("ready", flush=True)
if mode == "race":
    sys.stdin.readline()
try:
    while held.attempt():
        time.sleep(0.05)
except LaunchError as error:
    held.release()
    sys.exit(f"refused: {error}")
if mode == "fork" and not os.fork():
    time.sleep(60)
print("held", flush=True)
sys.stdin.read()
held.release()
"""


def start(folder: Path, mode: str = "hold") -> subprocess.Popen[str]:
    """Start a process that holds the lock of ``folder`` until its standard input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), mode],
        cwd=ROOT,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def holding(folder: Path, mode: str = "hold") -> subprocess.Popen[str]:
    process = start(folder, mode)
    assert process.stdout
    assert process.stdout.readline() == "held\n", process.communicate()
    return process


def claims(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "lock").glob("claim-*"))


def try_for(folder: Path, seconds: float) -> str | None:
    """Try to acquire the lock for some seconds, and release it. Return None on success, else the last sentence."""
    lock, deadline = FolderLock(folder), time.monotonic() + seconds
    try:
        while (waiting := lock.attempt()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return waiting
    finally:
        lock.release()


def write_claim(folder: Path, number: int = 1, **values: Any) -> Path:
    """Write the claim of a process on another machine."""
    record = Holder.of_this_process(True).model_copy(
        update={"host": "node7", "pid": 4242, "machine": "another boot", **values}
    )
    path = folder / "lock" / f"claim-{number:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json())
    return path


def test_a_live_holder_is_named_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    first = holding(tmp_path, "fork")
    with pytest.raises(LaunchError, match=rf"process {first.pid} on \S+, started \d{{4}}-.* UTC .*kill {first.pid}"):
        try_for(tmp_path, 5)
    assert claims(tmp_path) == ["claim-00000001"]
    first.kill()  # Its forked child survives, as a worker may for a moment.
    first.wait()
    lock = FolderLock(tmp_path)
    try:
        assert lock.attempt() is None
        assert claims(tmp_path) == ["claim-00000002"]
    finally:
        lock.release()
        os.killpg(first.pid, signal.SIGKILL)


def test_a_holder_that_ends_leaves_nothing(tmp_path: Path) -> None:
    process = holding(tmp_path)
    assert process.communicate("")[1] == ""
    assert process.returncode == 0
    assert claims(tmp_path) == []
    assert try_for(tmp_path, 0) is None


def test_a_folder_that_the_holder_made_and_did_not_fill_is_removed(tmp_path: Path) -> None:
    new = tmp_path / "new"
    with hold_folder(new):
        assert claims(new) == ["claim-00000001"]
    assert not new.exists()
    with hold_folder(new):
        (new / "file").touch()
    assert sorted(path.name for path in new.iterdir()) == ["file", "lock"]
    (tmp_path / "there").mkdir()
    with hold_folder(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir(), "a folder that existed before stays"


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_at_once_one_gets_the_lock(tmp_path: Path, stale: bool) -> None:
    if stale:
        process = holding(tmp_path)
        process.kill()
        process.wait()
    racers = [start(tmp_path, "race") for _ in range(5)]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        assert racer.stdout
    lines = [racer.stdout.readline() for racer in racers if racer.stdout]
    outputs = [racer.communicate("") for racer in racers]
    assert sorted(lines) == ["", "", "", "", "held\n"], outputs
    assert sum("refused" in error for _, error in outputs) == 4, outputs
    assert sorted(racer.returncode for racer in racers) == [0, 1, 1, 1, 1]


def test_on_another_machine_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_claim(tmp_path)
    waiting = FolderLock(tmp_path)
    sentence = waiting.attempt()
    assert sentence
    assert "process 4242 on node7" in sentence
    os.utime(path, (2e9, 2e9))  # Not the present time: clocks of file systems have steps of milliseconds.
    with pytest.raises(LaunchError, match="in use by process 4242 on node7"):
        waiting.attempt()
    waiting.release()
    assert claims(tmp_path) == ["claim-00000001"], "a failed attempt changes nothing"
    assert try_for(tmp_path, 0.2), "without a heartbeat the claim expires only after EXPIRY_SECONDS"
    monkeypatch.setattr(lock_module, "EXPIRY_SECONDS", 0.4)
    assert try_for(tmp_path, 30) is None
    path.write_bytes(b'{"host": ["')  # The holder died while it wrote this, or the file was damaged.
    assert "unknown process" in str(try_for(tmp_path, 0))
    assert try_for(tmp_path, 30) is None


def test_a_later_start_of_the_same_job_knows_that_the_earlier_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "alps")
    for job, mine, is_dead in (("alps/77", "1", True), ("alps/77", "0", False), ("other/77", "1", False)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", mine)
        write_claim(tmp_path, slurm_job=job, slurm_restart=0)
        assert (try_for(tmp_path, 0) is None) == is_dead, (job, mine)


def test_without_kernel_locks_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(lock_module, "EXPIRY_SECONDS", 0.2)
    machine = Holder.of_this_process(True).machine
    path = write_claim(tmp_path, machine=machine, kernel_lock=False)
    assert try_for(tmp_path, 0), "nothing proves that the holder is dead"
    lock = FolderLock(tmp_path)
    lock.attempt()
    time.sleep(0.3)
    assert lock.attempt() is None
    assert not json.loads((tmp_path / "lock/claim-00000002").read_text())["kernel_lock"]
    assert not path.exists()
    lock.release()


@pytest.mark.parametrize("loss", ["newer claim", "folder removed"])
def test_a_holder_that_lost_its_lock_ends_at_once(tmp_path: Path, loss: str) -> None:
    process = holding(tmp_path)
    if loss == "newer claim":
        write_claim(tmp_path, 2)
    else:
        (tmp_path / "lock/claim-00000001").unlink()
    assert process.wait(60) == 1
    assert process.stderr
    assert "another process acquired or removed the lock" in process.stderr.read()


@pytest.mark.parametrize(
    "words",
    [
        ["launch", "local", str(TINY), "--ranks", "2", "run_dir={run}"],
        ["compare", str(ROOT / "tests/compare/tiny.yaml"), "--plan", "run_dir={run}"],
        ["checkpoint", "import", "{run}/none", "{run}"],
        ["checkpoint", "import", str(ROOT), "{run}", "--from", "hf"],
        ["checkpoint", "prune", "{run}/none", str(ROOT / "configs/models/llama3.2-1b.yaml"), "{run}"],
    ],
    ids=["launch", "compare", "import", "import hf", "prune"],
)
def test_every_command_that_writes_into_a_run_folder_locks_it(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with hold_folder(tmp_path):
        assert main([word.format(run=tmp_path) for word in words]) == 1
    assert "holds the lock" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def hold_each(world: World, folders: list[str]) -> list[str]:
    answers = []
    for folder in folders:
        try:
            with hold_folder(Path(folder), world):
                answers.append("held")
        except LaunchError as error:
            answers.append(str(error))
    return answers


@pytest.mark.dist
def test_every_rank_raises_the_same_error(tmp_path: Path) -> None:
    process = holding(tmp_path / "used")
    folders = [str(tmp_path / name) for name in ("used", "free")]
    first, second = run_ranks("tests.io.test_lock:hold_each", 2, {"folders": folders})
    assert first == second
    assert f"process {process.pid} on" in first[0]
    assert first[1] == "held"
    assert not (tmp_path / "free").exists()
    process.communicate("")
