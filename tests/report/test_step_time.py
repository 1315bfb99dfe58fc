from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.metrics.goodput import GOODPUT_FILE
from mmscale.report.build import build_report
from mmscale.report.step_time import step_layers, step_rows
from tests.report.pages import Page


def lines(count: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "stage": "all",
            "loss": 2.0,
            "seconds": 2.0,
            "data_wait_seconds": 0.2,
            "forward_seconds": 0.6,
            "backward_seconds": 0.8,
            "optimizer_seconds": 0.2,
            "communication_seconds": 0.5,
            "forward_peak_bytes": 1 << 30,
            "backward_peak_bytes": 3 << 30,
            "model_flops": 4_000_000_000,
            "mfu": 0.25,
            "tokens": 10,
            "samples": 1,
            "lr": 1e-3,
            "grad_norm": 5.0,
            "time": 100.0 + 2 * step,
            **({"grad_norm/decoder": 3.0, "grad_norm/vision": 4.0} if step % 2 else {}),
        }
        for step in range(1, count + 1)
    ]


def test_layers_are_the_whole_step_at_every_step() -> None:
    layers = step_layers(lines(1000))
    assert [layer.label for layer in layers] == ["forward", "backward", "optimizer", "data", "other"]
    for parts in zip(*(layer.points for layer in layers), strict=True):
        assert len({step for step, _ in parts}) == 1
        assert [share for _, share in parts] == pytest.approx([30, 40, 10, 10, 10])
    assert step_layers([{"step": 1, "seconds": 1.0}]) == []
    assert step_rows([{"step": 1, "seconds": 1.0}]) == []


@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_page_shows_where_time_went(tmp_path: Path, count: int) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(count)))
    end = 100.0 + 2 * count
    notes = [
        {"time": 100.0, "kind": "started", "seconds": 0.0, "step": 0},
        {"time": 102.0, "kind": "setup", "seconds": 2.0, "step": 0},
        {"time": end + 3, "kind": "checkpoint", "seconds": 3.0, "step": count},
    ]
    (tmp_path / GOODPUT_FILE).write_text("".join(json.dumps(note) + "\n" for note in notes))
    shown = Page(build_report(tmp_path).read_text())
    page = shown.text
    goodput = 100 * 1.8 * count / (2 * count + 3)
    for words in (
        "Time of a step",
        "forward, of a step 30.0%",
        "communication, of a step 25.0%",
        "MFU 25.0%",
        "model operations per second 2G",
        "Model FLOPs utilisation",
        "Gradient norm by component",
        "rank 0, in backward 3.00 GiB",
        "checkpoints 3s",
        f"goodput {goodput:.1f}%",
        "starts 1",
    ):
        assert words in page, words
    (stack,) = (chart for chart in shown.charts if chart["stacked"])
    assert [line["label"] for line in stack["lines"]] == ["forward", "backward", "optimizer", "data", "other"]
    for shares in zip(*(line["y"] for line in stack["lines"]), strict=True):
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(100), "together they reach the top"
    norms = shown.charts[-1]["lines"]
    assert [(line["label"], set(line["y"])) for line in norms] == [("decoder", {3.0}), ("vision", {4.0})]
    assert all(x % 2 for line in norms for x in line["x"])
