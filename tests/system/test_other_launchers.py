"""The same command and configuration under torchrun and under the deepspeed launcher, and status and stop of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.cli.main import main
from tests.engine.ranks import free_port
from tests.system.conftest import REPO, TINY, MakeRun, kill_group

DEEPSPEED = Path(sys.executable).with_name("deepspeed")


def run_under(launcher: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Train three steps on two ranks."""
    train = ["train", str(TINY), f"run_dir={folder}", "max_steps=3"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [*launcher, "mmscale.cli.main", *train],
        cwd=REPO,
        env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO)},
        text=True,
        capture_output=True,
        check=False,
        timeout=500,
    )


def assert_trained_on_two_ranks(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["world_size"]) == (3, 2)
    environment = json.loads((folder / "starts/environment-0001.json").read_text())
    assert [node["ranks"] for node in environment["nodes"]] == [[0, 1]]
    assert json.loads((folder / "starts/outcome.json").read_text())["outcome"] == "finished"


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    assert_trained_on_two_ranks(tmp_path / "run", run_under([*torchrun, "-m"], tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.dist
def test_the_deepspeed_launcher(tmp_path: Path) -> None:
    assert shutil.which(DEEPSPEED), "installed with DeepSpeed"
    deepspeed = [sys.executable, str(DEEPSPEED), "--num_gpus=2", f"--master_port={free_port()}", "--module"]
    assert_trained_on_two_ranks(tmp_path / "run", run_under(deepspeed, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.resume
def test_status_and_stop_of_a_local_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("run", 2, "max_steps=100000", "stages.0.steps=100000")
    process = run.start()
    try:
        run.wait_for_step(process, 2, timeout=400)
        assert main(["launch", "status", str(run.folder), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["state"], found["world_size"], found["total_steps"]) == ("running", 2, 100_000)
        assert main(["launch", "stop", str(run.folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sent"] == "SIGUSR1"
        assert process.wait(240) == 75
    finally:
        kill_group(process)
    assert main(["launch", "status", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["reason"].partition(";")[0]) == ("stopped", "saved and stopped (signal SIGUSR1)")
    assert found["checkpoint_step"] == found["step"]
    assert main(["launch", "stop", str(run.folder)]) == 1
