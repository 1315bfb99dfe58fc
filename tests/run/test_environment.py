"""What a run records about its environment and its end."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from mmscale.dist import World
from mmscale.run.environment import variables, write_environment
from mmscale.run.outcome import OUTCOME_FILE, RunOutcome, read_outcome, recorded_outcome

ONE = World(0, 1, 0, torch.device("cpu"))

SECRETS = {
    "SLURM_JWT": "eyJhb",
    "HF_TOKEN": "hf_abc",
    "MMSCALE_API_KEY": "k",
    "APPTAINER_DOCKER_PASSWORD": "p",
    "CUDA_SECRET": "s",
    "HF_ENDPOINT": "https://user:word@host/x",
    "HF_MIRROR": "https://host/x?sig=abc",
    "AWS_SECRET_ACCESS_KEY": "a",
    "WANDB_API_KEY": "w",
    "MY_OWN": "o",
}
KEPT = {"NCCL_DEBUG": "INFO", "SLURM_JOB_NODELIST": "n[1-2]", "LD_LIBRARY_PATH": "/x", "HF_HOME": "/h"}


def test_variables_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **KEPT}.items():
        monkeypatch.setenv(name, value)
    found = variables()
    assert not set(found) & set(SECRETS)
    assert {name: found[name] for name in KEPT} == KEPT


def test_the_file_names_machine_modules_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADEDMODULES", "gcc/13:cuda/12.8")
    monkeypatch.setenv("HF_TOKEN", "hf_never")
    path = tmp_path / "starts/environment-0001.json"
    write_environment(path, ONE)
    assert "hf_never" not in path.read_text()
    found = json.loads(path.read_text())
    assert found["modules"] == ["gcc/13", "cuda/12.8"]
    assert [node["ranks"] for node in found["nodes"]] == [[0]]
    assert found["packages"]["torch"] == version("torch")


def test_the_outcome_of_the_newest_start(tmp_path: Path) -> None:
    with recorded_outcome(tmp_path, True) as outcomes:
        outcomes.append(RunOutcome(outcome="stopped", message="signal SIGUSR1"))
    assert read_outcome(tmp_path) == RunOutcome(outcome="stopped", message="signal SIGUSR1")
    with recorded_outcome(tmp_path, True):
        assert read_outcome(tmp_path) is None, "a start that is killed must not show the end of the one before"
    with pytest.raises(ValueError, match="no data"), recorded_outcome(tmp_path, True):
        raise ValueError("no data" + "x" * 5000)
    failed = read_outcome(tmp_path)
    assert failed is not None
    assert (failed.outcome, failed.message[:7], len(failed.message)) == ("failed", "no data", 2000)
    with recorded_outcome(tmp_path, False) as outcomes:
        outcomes.append(RunOutcome(outcome="finished", message=""))
    assert read_outcome(tmp_path) == failed, "only rank 0 writes"
    (tmp_path / OUTCOME_FILE).write_text('{"outcome": "fine"}')
    assert read_outcome(tmp_path) is None
