"""``mmscale params`` on a model's file, a run's file, and a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.main import main

TINY = "configs/models/tiny.yaml"


def test_counts_of_a_models_file_and_of_a_runs_file_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", TINY, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert set(counts) == {"total", "active", "components"}
    assert counts["total"] == sum(counts["components"].values())
    model = "\n".join("  " + line for line in Path(TINY).read_text(encoding="utf-8").splitlines())
    run = tmp_path / "run.yaml"
    run.write_text(f"run_dir: somewhere\nmodel:\n{model}\n", encoding="utf-8")
    assert main(["params", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == counts
    assert main(["params", str(run), "model.connector.kind=embedding", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] < counts["total"]


def test_a_wrong_key_is_named_with_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", TINY, "decoder.num_layer=3"]) == 2
    message = capsys.readouterr().err
    assert "num_layers" in message
    assert "Traceback" not in message
