"""The batch script's answers to ``mmscale launch stop`` and to a finished chain, without SLURM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launchers import STOP_FILE
from launchers.slurm import submit
from tests.launchers.test_slurm import golden_job, run_script

SAVED = "mkdir -p checkpoints/step-00000002; echo > checkpoints/step-00000002/manifest.json; exit 75"


def job_of(folder: Path, body: str, **changes: object) -> object:
    executable = ("bash", "-c", f'cd "$0" && touch started; {body}')
    return golden_job(folder, run_dir=folder, arguments=(str(folder),), executable=executable, setup=(), **changes)


def test_a_stopped_run_saves_and_is_not_requeued(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    done = run_script(tmp_path, job_of(folder, f"touch {STOP_FILE}; {SAVED}"))  # type: ignore[arg-type]
    assert done.returncode == 75, done.stdout + done.stderr
    assert "saved and stopped by mmscale launch stop" in done.stdout
    assert "requeued" not in done.stdout


def test_a_job_that_starts_after_the_stop_ends_without_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / STOP_FILE).touch()
    done = run_script(tmp_path, job_of(folder, "exit 0"))  # type: ignore[arg-type]
    assert done.returncode == 75
    assert not (folder / "started").exists()


def test_the_rest_of_a_chain_ends_at_once_when_the_run_is_finished(tmp_path: Path) -> None:
    """A result that is older than the submission does not count: the chain extends a finished run."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    script, result = folder / "logs/job.sbatch", folder / "result.json"
    for path, seconds in ((result, 1_000_000_000), (script, 1_000_000_005)):
        path.touch()
        os.utime(path, (seconds, seconds))
    chained = job_of(folder, "touch result.json", requeue=False, is_chained=True)
    first = run_script(tmp_path, chained)  # type: ignore[arg-type]
    assert (first.returncode, (folder / "started").exists()) == (0, True)
    (folder / "started").unlink()
    second = run_script(tmp_path, chained)  # type: ignore[arg-type]
    assert (second.returncode, (folder / "started").exists()) == (0, False)
    assert "an earlier job of this chain finished the run" in second.stdout


def test_a_chain_is_submitted_job_by_job_and_removes_the_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(f"#!/bin/bash\necho $@ >>{tools}/calls\necho $((100 + $(wc -l <{tools}/calls)))\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / STOP_FILE).touch()
    numbers, script = submit(job_of(folder, "exit 0", requeue=False, is_chained=True), 3)  # type: ignore[arg-type]
    assert numbers == ["101", "102", "103"]
    assert (tools / "calls").read_text() == f"--parsable {script}\n" * 3
    assert "#SBATCH --dependency=singleton\n" in script.read_text()
    assert not (folder / STOP_FILE).exists()
