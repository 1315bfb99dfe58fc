"""A fine-tuning run with adapters on another run: training, generation, exchange with peft, merged export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint import list_checkpoints
from mmscale.cli.main import main
from tests.system.conftest import REPO, Run

CONFIG = "tests/system/tiny.yaml"
TEXT = (
    *("model.vision=null", "model.connector=null", "data.lanes=2"),
    "data.datasets=[{name: text, manifest: examples/emoji/shards/train-text.manifest, template: {kind: text}}]",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs ``base`` and ``tuned``."""
    folder = tmp_path_factory.mktemp("runs")
    stages = "stages=[{name: %s, steps: 2, train: [%s], learning_rate: {default: 0.05}%s}]"
    first = stages % ("base", "decoder", "")
    second = stages % ("tune", "adapters", f", weights: [{{checkpoint: {folder / 'base'}}}]")
    adapters = "model.adapters={kind: dora, rank: 4, targets: {decoder: [q_proj, mlp.up_proj]}}"
    for name, words in (("base", [first]), ("tuned", [second, adapters])):
        Run(folder / name, ["train", CONFIG, f"run_dir={folder / name}", *TEXT, *words], forked=True).finish()
    return folder


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)  # Paths of the bundled data are relative to it.


def printed(words: list[Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_of_imported_adapters_answers_like_the_trained_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = printed(["checkpoint", "export", runs / "tuned", tmp_path / "adapters", "--to", "peft"], capsys)
    assert (written["family"], written["layers"]) == ("llama", 4)
    words = ["checkpoint", "import", tmp_path / "adapters", runs / "back", "--from", "peft", "--base", runs / "base"]
    assert printed(words, capsys)["adapters"]["targets"]["decoder"] == ["q_proj", "up_proj"]
    asked = ["--prompt", "the", "--max-new-tokens", "24", "--temperature", "3", "--top-p", "1"]
    answers = {name: printed(["generate", runs / name, *asked], capsys)["text"] for name in ("base", "tuned", "back")}
    assert answers["tuned"] == answers["back"]
    assert answers["tuned"] != answers["base"]


def test_checkpoints_are_small_and_a_lost_base_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        sum(file.stat().st_size for file in list_checkpoints(runs / name / "checkpoints")[-1].glob("*.safetensors"))
        for name in ("base", "tuned")
    ]
    assert sizes[1] < 0.2 * sizes[0]
    (row,) = printed(["checkpoint", "list", runs / "tuned"], capsys)["checkpoints"]
    assert row["frozen_weights_in"] == str(list_checkpoints(runs / "base/checkpoints")[-1])
    (runs / "base").rename(runs / "moved")
    assert main(["generate", str(runs / "tuned"), "--prompt", "the"]) == 1
    error = capsys.readouterr().err
    assert "put that checkpoint back" in error
    assert "Traceback" not in error
    (runs / "moved").rename(runs / "base")
