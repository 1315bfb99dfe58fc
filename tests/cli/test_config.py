"""``mmscale config`` and ``mmscale launch slurm --dry-run`` on the quickstart, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path

import pytest

from mmscale.cli.main import main

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", QUICKSTART, "seed=7", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["values"]["seed"] == 7
    assert shown["origins"]["seed"] == "override 1 (seed=7)"
    assert shown["origins"]["data.lanes"].startswith(f"{QUICKSTART}:")
    assert shown["origins"]["engine.timeout_seconds"] == "default"
    assert shown["values"].keys() == shown["origins"].keys()


def test_show_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", QUICKSTART, "engine.zero_stage=2"]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("engine.zero_stage"))
    assert line.split() == ["engine.zero_stage", "=", "2", "#", "override", "1", "(engine.zero_stage=2)"]


def test_a_dropped_key_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["config", "show", QUICKSTART, "model.connector.kind=embedding"]) == 0
    out, err = capfd.readouterr()
    warned = [line for line in err.splitlines() if "model.connector.gate_init: dropped" in line]
    assert len(warned) == 1
    assert warned[0].startswith(f"mmscale: warning: {QUICKSTART}:")
    assert "\n# configs/quickstart.yaml:" in out


@pytest.mark.fault
def test_mistakes_are_listed_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", QUICKSTART, "model.conector.kind=x", "engine.zero_stage=many"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.conector: unknown key; did you mean 'connector'?" in err
    assert "override 2 (engine.zero_stage=many) engine.zero_stage=many: " in err
    assert "Traceback" not in err


def test_dry_run_prints_a_legal_script_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["launch", "slurm", QUICKSTART, f"run_dir={run_dir}", "--nodes", "2", "--gpus-per-node", "2", "--dry-run"]
    assert main(words) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in script
    assert f"-m mmscale.cli.main train {QUICKSTART} run_dir={run_dir})" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not run_dir.exists()


@pytest.mark.fault
@pytest.mark.parametrize("target", [["local", "--ranks", "2"], ["slurm"]])
def test_a_wrong_configuration_starts_nothing(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", target[0], QUICKSTART, "seed=x", *target[1:]]) == 2
    assert "override 1 (seed=x) seed=x: expected a whole number" in capsys.readouterr().err


def test_shrink_says_what_it_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    held = "{name: style, manifest: examples/emoji/shards/heldout-style.manifest, field: name}"
    assert main(["config", "shrink", "configs/recipes/qwen2-vl-2b.yaml", f"evaluation.sets=[{held}]"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")] == [
        "# left out: stages.0.weights.0: runs/dfn-vit (vision)",
        "# left out: stages.0.weights.1: runs/qwen2-7b (decoder)",
        "# left out: evaluation.sets: style",
    ]
    assert main(["config", "shrink", "configs/recipes/fuyu-8b.yaml"]) == 0
    assert "#" not in capsys.readouterr().out


def test_shrink_prints_a_run_that_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        main(["config", "shrink", "configs/recipes/emoji-stages.yaml", "seed=7", "--steps", "3", "--lanes", "1"]) == 0
    )
    small = tmp_path / "small.yaml"
    small.write_text(capsys.readouterr().out)
    assert main(["config", "show", str(small), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert [values[f"stages.{n}.steps"] for n in range(3)] == [3, 3, 3]
    assert [values[f"stages.{n}.warmup_steps"] for n in range(3)] == [1, 1, 1]
    assert (values["seed"], values["data.lanes"], values["model.decoder.hidden_dim"]) == (7, 1, 16)
