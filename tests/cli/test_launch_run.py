"""``mmscale launch status|logs|stop``, with a process that holds a folder and with stand-ins of SLURM's commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.slurm import job_name
from mmscale.cli import launch_run
from mmscale.cli.main import main
from mmscale.io.lock import Holder

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run/logs").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def process(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder ``run`` and survives SIGUSR1."""
    command = [sys.executable, "-m", "tests.run.holder", str(run)]
    holder = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield holder
    holder.kill()
    holder.wait()


@pytest.fixture
def queue(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submitted run. ``squeue`` prints the file ``queue``; ``scancel`` appends its words to ``cancelled``."""
    tools = run.parent
    (run / "logs/job.sbatch").touch()
    (tools / "squeue").write_text(f'#!/bin/bash\n[[ " $* " == *" --name={job_name(run)} "* ]] && cat {tools}/queue\n')
    (tools / "scancel").write_text(f"#!/bin/bash\necho $* >>{tools}/cancelled\n")
    for name in ("squeue", "scancel"):
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tools / "queue"


def test_stop_of_a_run_on_this_machine(
    run: Path, process: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "stop", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "process": process.pid, "sent": "SIGUSR1"}
    deadline = time.monotonic() + 60
    while not (run / "signalled").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.poll() is None
    assert main(["launch", "status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
    assert main(["launch", "stop", str(run), "--now"]) == 0
    assert process.wait(60) == -9
    assert main(["launch", "stop", str(run)]) == 1
    assert "there is nothing to stop" in capsys.readouterr().err


def test_stop_signals_running_jobs_removes_waiting_ones_and_leaves_a_marker(
    run: Path, queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.write_text("7|RUNNING|None|n1\n8|PENDING|Dependency|\n9|PENDING|Dependency|\n")
    assert main(["launch", "status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["job"], [each["job"] for each in found["queue"]]) == ("running", "7", ["7", "8", "9"])
    assert main(["launch", "stop", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed_jobs"] == ["8", "9"]
    assert (queue.parent / "cancelled").read_text() == "8 9\n--signal=USR1 7\n"
    assert (run / "logs/stop-requested").exists()
    assert main(["launch", "stop", str(run), "--now"]) == 0
    assert (queue.parent / "cancelled").read_text().endswith("8 9\n7\n")


def test_stop_without_jobs_leaves_no_marker(run: Path, queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue.write_text("")
    assert main(["launch", "stop", str(run)]) == 1
    assert "there is nothing to stop" in capsys.readouterr().err
    assert not (run / "logs/stop-requested").exists()


def test_a_run_elsewhere_must_be_stopped_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = Holder.of_this_process(False).model_copy(update={"machine": "other", "host": "n7", "slurm_job": ""})
    (run / "lock").mkdir()
    (run / "lock/kernel").touch()
    (run / "lock/claim-00000001").write_text(theirs.model_dump_json())
    assert main(["launch", "stop", str(run)]) == 1
    assert "its process runs on n7; give this command there" in capsys.readouterr().err


def test_a_queue_that_does_not_answer_is_reported_and_the_state_is_read_from_files(
    run: Path, queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (queue.parent / "squeue").write_text("#!/bin/bash\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    assert main(["launch", "status", str(run)]) == 0
    said = capsys.readouterr()
    assert "the queue is unknown: squeue failed: Unable to contact slurm controller" in said.err
    assert said.out.startswith("state     never started")
    assert main(["launch", "stop", str(run)]) == 1


def test_logs_of_the_newest_job(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for job, text in ((99, "old\n"), (100, "a\nb\nc\n")):
        (run / f"logs/slurm-{job}.log").write_text(text)
    (run / "logs/slurm-99-1.log").write_text("rank 1 of the job before\n")
    assert main(["launch", "logs", str(run), "--lines", "2"]) == 0
    assert capfdbinary.readouterr().out == b"b\nc\n"
    assert main(["launch", "logs", str(run), "--rank", "1"]) == 0
    assert capfdbinary.readouterr().out == b"rank 1 of the job before\n"
    assert main(["launch", "logs", str(run), "--rank", "2"]) == 1
    assert b"no job has a log of rank 2" in capfdbinary.readouterr().err


def test_logs_of_a_run_on_this_machine(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (run / "logs/rank-1.log").write_text("one\n")
    assert main(["launch", "logs", str(run), "--rank", "1"]) == 0
    assert capfdbinary.readouterr().out == b"one\n"
    assert main(["launch", "logs", str(run)]) == 1
    assert b"rank 0 of a run on this machine writes to the terminal" in capfdbinary.readouterr().err
    assert main(["launch", "logs", str(run / "gone")]) == 1


def test_logs_follow_the_file_and_then_the_next_job(
    run: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, following = run / "logs/slurm-7.log", run / "logs/slurm-8.log"
    log.write_text("a\n")
    actions = iter([lambda: log.open("a").write("b\n"), lambda: following.write_text("c\n"), lambda: None])

    def wait(_seconds: float) -> None:
        action = next(actions, None)
        if action is None:
            raise KeyboardInterrupt
        action()

    monkeypatch.setattr(launch_run.time, "sleep", wait)
    assert main(["launch", "logs", str(run), "--follow"]) == 130
    assert capfdbinary.readouterr().out == f"a\nb\n==> {following} <==\nc\n".encode()
