"""``mmscale launch slurm --doctor`` examines all nodes of a real SLURM job and ends."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from mmscale.cli.main import main
from tests.slurm.cluster import Cluster

TINY = Path(__file__).parents[1] / "system/tiny.yaml"


@pytest.mark.slurm
def test_the_doctor_examines_every_node(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = [
        "launch",
        "slurm",
        str(TINY),
        f"run_dir={run}",
        "--nodes",
        "2",
        "--ranks-per-node",
        "1",
        "--doctor",
        "--json",
    ]
    assert main(words) == 0
    number = json.loads(capsys.readouterr().out)["job"]
    deadline = time.monotonic() + 240
    while (state := re.findall(r"JobState=(\w+)", cluster.call("scontrol", "show", "job", number, "-o"))[0]) in (
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"),
    ):
        assert time.monotonic() < deadline, state
        time.sleep(0.5)
    logs = "\n".join(path.read_text() for path in sorted((run / "doctor/logs").glob("*.log")))
    assert state == "COMPLETED", logs
    found = json.loads((run / "doctor/result.json").read_text())
    assert found["status"] != "failure"
    by_name = {line["name"]: line for line in found["lines"]}
    assert by_name["norm in bfloat16"]["ranks"] == [0, 1]
    assert "2 ranks" in by_name["clocks"]["found"]
    assert by_name["all-reduce"]["found"].startswith("gloo")
    assert not (run / "checkpoints").exists()


def test_the_script_examines_once_and_never_requeues(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["launch", "slurm", str(TINY), f"run_dir={tmp_path / 'run'}", "--nodes", "2", "--doctor", "--dry-run"]
    assert main(words) == 0
    script = capsys.readouterr().out
    assert f" doctor --folder {tmp_path / 'run'} --device auto" in script
    assert "#SBATCH --no-requeue" in script
    assert "launchers.health" not in script
    assert main([*words, "--chain", "2"]) == 2
    assert "leave out --chain" in capsys.readouterr().err
    assert main([*words, "--requeue"]) == 2
