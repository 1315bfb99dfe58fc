"""``mmscale config`` and ``mmscale launch slurm --dry-run`` on the quickstart, as a user calls them."""

from __future__ import annotations

import json
import re
import subprocess
import warnings
from pathlib import Path

import pytest

from data_pipeline.loader.loader import Loader
from mmscale.cli.main import main
from mmscale.config import dump, leaves, load
from mmscale.errors import ConfigError
from mmscale.report.configuration import save_origins
from mmscale.run.config import RunConfig
from mmscale.run.rank_check import compared_values

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


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["config", *words]) == 0
    return capsys.readouterr().out


def test_show_yaml_starts_the_same_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = "configs/recipes/emoji-stages.yaml"
    extra = ["seed=7", "stages.0.learning_rate=1e-4", "engine.zero_stage=1"]
    copy = tmp_path / "copy.yaml"
    copy.write_text(shown(capsys, "show", recipe, "--yaml", *extra), encoding="utf-8")
    original, again = load(recipe, extra, RunConfig).value, load(copy, [], RunConfig).value
    assert again == original
    assert compared_values(again) == compared_values(original)  # The files of equal paths, by checksum.
    assert state_after_one_step(again) == state_after_one_step(original)


def state_after_one_step(run: RunConfig) -> str:
    """Return the resume state of the first stage's loader, with its fingerprint."""
    with Loader(run.stage_data(0), run.stage_media(0), seed=run.seed, rank=0, world_size=1) as loader:
        return next(iter(loader)).state.to_json()


def test_diff_names_both_origins(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "diff", QUICKSTART, "configs/recipes/emoji-full.yaml", "--json")
    found = json.loads(out)["differences"]
    a, b = (
        {".".join(path): value for path, value in leaves(load(path, [], RunConfig).value)}
        for path in (QUICKSTART, "configs/recipes/emoji-full.yaml")
    )
    assert set(found) == {key for key in {**a, **b} if a.get(key, "-") != b.get(key, "-")}
    assert found["run_dir"]["a_origin"].startswith(f"{QUICKSTART}:")
    assert found["run_dir"]["b_origin"].startswith("configs/recipes/emoji-full.yaml:")
    assert shown(capsys, "diff", QUICKSTART, QUICKSTART) == ""


def test_diff_of_a_run_folder_has_the_origins_of_its_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    loaded = load(QUICKSTART, ["seed=7"], RunConfig)
    (tmp_path / "config.yaml").write_text(dump(loaded.value), encoding="utf-8")
    save_origins(tmp_path, loaded.origins)
    out = shown(capsys, "diff", QUICKSTART, str(tmp_path))
    assert out.splitlines()[0] == "seed"
    assert re.fullmatch(rf"  - 1 +# {QUICKSTART}:\d+", out.splitlines()[1])
    assert out.splitlines()[2] == "  + 7  # override 1 (seed=7)"
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["engine.zero_stage"], ["0 | 1 | 2 | 3", "default  3", "gradients"]),
        (
            ["model.connector.every"],
            ["(of kind cross_attention, hybrid)", "whole number (greater than 0", "default  4"],
        ),
        (["model.connector.every", QUICKSTART], [f"model.connector.every = 4  # {QUICKSTART}:"]),
        (["stages.learning_rate", QUICKSTART, "stages.0.learning_rate=2e-4"], ["default = 0.0002  # override 1 ("]),
        (["stages.0.data.lanes"], ["Rows of the global batch", "none: a value is required"]),
        (["checkpoint"], ["keep_last", "every_steps"]),
        (["compare.seeds"], ["list of whole number"]),
        (["stages.optimizer"], ["adamw, adafactor, muon", "(muon) Decay rate of the momentum"]),
    ],
    ids=str,
)
def test_explain(capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]) -> None:
    out = shown(capsys, "explain", *words)
    assert [part for part in parts if part not in out] == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("engine.zero_stag", "did you mean 'engine.zero_stage'?"),
        ("every_steps", "checkpoint.every_steps"),
        ("learning_rte", "did you mean stages.*.learning_rate?"),
        ("data.packing.foo", "data.packing has max_tokens"),
        ("qqq", "the top level has run_dir, seed"),
    ],
)
def test_explain_names_the_nearest_key(capsys: pytest.CaptureFixture[str], key: str, nearest: str) -> None:
    assert main(["config", "explain", key]) == 2
    assert f"mmscale: {key}: no such key; " in (err := capsys.readouterr().err)
    assert nearest in err


def test_explain_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, "explain", "seed", QUICKSTART, "seed=7", "--json"))
    assert found["values"] == {"seed": {"value": 7, "origin": "override 1 (seed=7)"}}
    assert (found["explanations"][0]["key"], found["explanations"][0]["default"]) == ("seed", 1)


@pytest.mark.parametrize("rate", ["1e-3", "'1e-3'", "0.001", "{default: 1e-3}"])
def test_one_learning_rate_for_all_components(rate: str) -> None:
    loaded = load(QUICKSTART, [f"stages.0.learning_rate={rate}"], RunConfig)
    assert loaded.value.stages[0].learning_rate == {"default": 1e-3}
    assert loaded.origins["stages.0.learning_rate.default"].kind == "override"


@pytest.mark.fault
@pytest.mark.parametrize("rate", ["fast", "0", "-1", "null", "[1e-3]"])
def test_a_wrong_learning_rate_is_named_as_it_was_written(rate: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\.0\.learning_rate.*: (expected a number|must be greater than 0)"):
        load(QUICKSTART, [f"stages.0.learning_rate={rate}"], RunConfig)
