"""The local launcher with real processes that do not train: exit codes, signals, logs, and no remaining process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent

LAUNCH = """
import sys
from pathlib import Path
from launchers.local import launch
folder = Path(sys.argv[1])
sys.exit(launch(sys.argv[1:], 2, folder / "run", module="stand_in"))
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 120
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear"
        time.sleep(0.05)


def rank_pids(folder: Path) -> list[int]:
    wait_for(folder, "alive-0", "alive-1")
    return [int((folder / f"alive-{rank}").read_text()) for rank in (0, 1)]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if running(pid)]}"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # A zombie has ended; its parent has not read its exit code yet.


def test_all_ranks_finish(tmp_path: Path) -> None:
    process = start(tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert (out, err) == ("out of rank 0\n", "err of rank 0\n")
    lines = (tmp_path / "run/logs/rank-1.log").read_text().splitlines()
    assert sorted(lines) == ["err of rank 1", "out of rank 1"]
    assert (tmp_path / "world-0").read_text() == (tmp_path / "world-1").read_text() == "2 1"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once_and_stopped_is_75(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "stay=100")
    rank_pids(tmp_path)
    os.kill(process.pid, number)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


@pytest.mark.fault
def test_exit_code_of_the_rank_that_failed_and_its_last_words(tmp_path: Path) -> None:
    process = start(tmp_path, "code1=2")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "rank 1 ended with exit code 2" in err
    assert "err of rank 1" in err
    assert "Traceback" not in err


@pytest.mark.fault
def test_an_error_of_all_ranks_is_printed_once_whichever_ends_first(tmp_path: Path) -> None:
    process = start(tmp_path, "complain=the lanes do not fit", "code0=2", "code1=2", "late=0")
    _, err = process.communicate()
    assert process.returncode == 2
    assert "rank 1 ended with exit code 2" in err
    assert err.count("the lanes do not fit") == 1


@pytest.mark.fault
def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    process = start(tmp_path, "kill=1")
    pids = rank_pids(tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 was killed by signal 9 (SIGKILL), as the kernel does when memory runs out" in err
    assert_gone(pids)


@pytest.mark.fault
def test_nothing_outlives_a_killed_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process = start(tmp_path, "stay=100")
    pids = rank_pids(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert_gone(pids)
    assert list(scratch.iterdir()) == []


@pytest.mark.fault
def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    process = start(tmp_path, "stubborn=yes")
    pids = rank_pids(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    wait_for(tmp_path, "signals-0", "signals-1")  # The system may merge two signals that a process has not handled.
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert_gone(pids)
