"""``mmscale plan``: its output, exit codes and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli.main import main
from mmscale.plan.cluster import PRESETS, read_cluster, write_accelerator

TINY = "tests/system/tiny.yaml"


def test_a_run_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "--gpus-per-node", "2", "--price", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["cost"] == pytest.approx(3 * found["gpu_hours"])
    assert main(["plan", TINY, "--gpus-per-node", "2"]) == 0
    text = capsys.readouterr().out
    for words in ("memory of a rank in pretrain", "smallest cluster", "what would help", "replayed 12 packs"):
        assert words in text


def test_a_run_that_does_not_fit_exits_with_1_and_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_accelerator(tmp_path / "small.yaml", PRESETS["h100"]().model_copy(update={"memory_bytes": 100_000}))
    words = ["plan", TINY, "--gpu", str(tmp_path / "small.yaml"), "--gpus-per-node", "2"]
    assert main(words) == 1
    assert "does not fit: stage pretrain: a rank needs" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert len(found["limits"]) == 1


@pytest.mark.slow
def test_more_ranks_than_lanes_are_no_lack_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "--gpus-per-node", "8"]) == 1
    text = capsys.readouterr().out
    assert "set data.lanes=8 or more" in text
    assert "still too large" not in text


def test_an_assumed_document_replaces_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", TINY, "--gpus-per-node", "1", "--document-tokens", "9", "--image-size", "40x30"]
    assert main(words) == 0
    assert "10 tokens (image of 40x30 pixels)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "no such preset; write one of a100"),
        (["--image-size", "40"], "expected WIDTHxHEIGHT in pixels, for example 1024x768"),
        (["--gpu", "cpu", "engine.precision=bf16"], "cpu has no peak_flops for bf16"),
        (["--nodes", "0"], "--nodes"),
        (["--calibrate", "--gpu", "h100"], "--calibrate measures this machine"),
        (["--calibrate", "--gpus-per-node", "5"], "world size 5 does not fit data.lanes=4"),
    ],
)
def test_wrong_use_exits_with_2_and_a_remedy(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", TINY, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_plan_finds_the_calibration_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks measure this machine at the same time."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["plan", TINY, "--gpus-per-node", "2", "--calibrate", "--json"]) == 0
    device = read_cluster("cpu", 1, 2).accelerator
    printed = json.loads(capsys.readouterr().out)
    assert printed["memory_bandwidth"] == device.memory_bandwidth > 1e8
    assert device.peak_flops["fp32"] > 1e8
    assert device.node_latency_seconds > 0
    assert device.unit_seconds > 0
    assert main(["plan", TINY, "--gpu", "cpu", "--gpus-per-node", "2"]) == 0
    assert "measured by mmscale plan --calibrate on 2 ranks" in capsys.readouterr().out
