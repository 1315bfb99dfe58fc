"""``mmscale data reference``, and runs on its shards: their steps are those of a run that holds the reference model."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from mmscale.cli.main import main
from mmscale.config import load
from mmscale.errors import CheckpointError
from mmscale.run.config import RunConfig
from mmscale.run.stage_teachers import reference_checksum
from mmscale.run.train import train

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/system/preference.yaml"
KEY = "stages.1.data.datasets.0"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends before its stage of preferences."""
    folder = tmp_path_factory.mktemp("runs") / "answers"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(load(CONFIG, [f"run_dir={folder}", "max_steps=1", "stages.0.steps=1"], RunConfig))
    return folder


def reference(capsys: pytest.CaptureFixture[str], run: Path, output: Path, *words: str) -> dict[str, Any]:
    """Run the command on the run's newest checkpoint and return its results."""
    capsys.readouterr()
    given = ["data", "reference", str(CONFIG), f"run_dir={run}", "stages.0.steps=1", "--output", str(output)]
    assert main([*given, "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return loss, gradient norm and metrics of each step."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in each.items() if k in ("loss", "grad_norm") or k.startswith("metric/")} for each in read]


def test_the_checksum_of_a_reference_is_text_in_an_override(tmp_path: Path) -> None:
    """All digits, or digits around an e, are a number in YAML."""
    for digits in ("12345678", "1234e567", "00000000"):
        (tmp_path / "manifest.json").write_text(f'{{"crc32":"{digits}",\n}}')
        named = reference_checksum(tmp_path, ema=False)
        config = load(CONFIG, [f"{KEY}.template.stored_reference={named}"], RunConfig).value
        assert config.stored_reference(1) == named == f"crc32:{digits}"


@pytest.mark.slow
def test_a_run_on_stored_log_probabilities_equals_one_that_holds_the_reference(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = reference(capsys, answers, tmp_path / "shards", "--jobs", "2")
    checksum, manifest = result["stored_reference"], result["manifest"]
    stored = [f"{KEY}.manifest={manifest}", f"{KEY}.template.stored_reference={checksum}"]
    for name, overrides in {"live": [], "stored": stored}.items():
        copytree(answers, tmp_path / name)
        (tmp_path / name / "result.json").unlink(missing_ok=True)
        words = [f"run_dir={tmp_path / name}", "max_steps=4", "stages.0.steps=1", *overrides]
        train(load(CONFIG, words, RunConfig))
    live, shards = lines(tmp_path / "live"), lines(tmp_path / "stored")
    assert len(live) == len(shards) == 4
    assert shards[1]["metric/reward_margin"] == pytest.approx(0, abs=1e-5)
    assert abs(live[3]["metric/reward_margin"]) > 1e-3
    for ours, wanted in zip(shards, live, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5, abs=2e-5)
    assert not (tmp_path / "stored" / "references").exists()  # The run does not keep the reference.

    other = [f"run_dir={tmp_path / 'other'}", "stages.0.steps=1", *stored]
    with pytest.raises(CheckpointError, match=f"template.stored_reference={checksum}, but the reference model"):
        train(load(CONFIG, ["seed=9", "max_steps=2", *other], RunConfig))


@pytest.mark.slow
def test_a_checkpoint_within_the_stage_before_is_no_reference(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "data",
        "reference",
        str(CONFIG),
        f"run_dir={answers}",
        "stages.0.steps=2",
        "--output",
        str(tmp_path / "s"),
    ]
    assert main(words) == 2
    assert "it is step 1 of stage learn, and the reference is the end of stage learn" in capsys.readouterr().err
