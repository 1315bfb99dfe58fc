"""benchmarks.gpu cuts its models to the memory of a card, by the prediction of ``mmscale plan``, and to its formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch

from benchmarks import gpu
from mmscale.errors import UnsupportedError
from mmscale.plan.memory import memory_of_rank

CARDS = {16: 15.6, 24: 23.5}
"""Memory that CUDA reports for cards of 16 GB (RTX 4080) and 24 GB (RTX 4090), in GiB."""
CUTS = {
    ("dense 1B", 16): "2 blocks, packs of 8192 tokens",
    ("dense 1B", 24): "4 blocks, packs of 8192 tokens",
    ("OLMoE", 16): "1 block of 32 experts, packs of 4096 tokens",
    ("OLMoE", 24): "1 block, packs of 8192 tokens",
    ("vision 11B", 16): "4 blocks, 8 tower blocks, vision frozen, packs of 2048 tokens and 1 document",
    ("vision 11B", 24): "4 blocks, 8 tower blocks, packs of 2048 tokens and 1 document",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", gpu.SHAPES)
def test_small_cards_get_a_cut_that_fits(model: str, tmp_path: Path) -> None:
    """With CUDA's context and NCCL. The largest cuts are left out, which take most of the time."""
    shape, arguments = gpu.SHAPES[model], gpu.arguments([])
    shape = replace(shape, cuts=shape.cuts[-3:])
    for card, size in CARDS.items():
        memory = int(size * 2**30)
        cut, config, predicted = gpu.largest_fitting(shape, "bf16", arguments, tmp_path, memory)
        assert str(cut) == CUTS[model, card]
        needed = memory_of_rank(config, 0, 1, device="cuda")
        assert predicted == needed.peak_bytes
        assert needed.peak_bytes + needed.overhead_bytes <= memory
        trained = set(config.stages[0].train)
        assert trained == set(shape.train) - set(cut.frozen)
    with pytest.raises(UnsupportedError, match=r"need \d+ GB, of which this device has 3 GB free"):
        gpu.largest_fitting(shape, "bf16", arguments, tmp_path, 4 * 10**9)


def test_a_cut_tower_keeps_the_kinds_of_its_blocks() -> None:
    """In proportion: the blocks over all tiles, and the blocks whose outputs the decoder gets."""
    base = Path(gpu.__file__).parents[1] / "configs/models/llama3.2-11b-vision.yaml"
    half, eighth = (gpu.Cut(4, 2048, tower_blocks=blocks).model(base)["vision"] for blocks in (16, 4))
    assert half == {"num_layers": 16, "feature_layers": [1, 3, 7, 11, 15], "tiles": {"global_layers": 4}}
    assert eighth == {"num_layers": 4, "feature_layers": [0, 1, 2, 3], "tiles": {"global_layers": 1}}


def test_a_card_without_bf16_is_measured_in_fp16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With SDPA alone. A step whose gradient overflows is not counted; in bf16 it is a failure."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    arguments, shape = gpu.arguments(["--steps", "3"]), gpu.SHAPES["dense 1B"]
    precision = gpu.measured_precision(arguments)
    assert precision.name == "fp16"
    assert gpu.kernels(arguments, precision) == ["sdpa"]
    assert "not measured: engine.attention=torch_varlen needs" in capsys.readouterr().err

    def trained(words: list[str], **options: Any) -> CompletedProcess[str]:
        folder = tmp_path / "run"
        folder.mkdir()
        skipped = (0, 1, 5)
        step = {"loss": 9.0, "data_wait_seconds": 0.0, "checkpoint_seconds": 0.0}
        lines = [
            {**step, "applied": n not in skipped, "tokens": 8, "seconds": 99.0 if n in skipped else 2.0}
            for n in range(7)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "result.json").write_text('{"memory": {"device_bytes": [1], "rss_bytes": [1]}}')
        return CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(gpu.subprocess, "run", trained)
    rows = [
        gpu.run_case("x", gpu.run_config(shape, shape.cuts[-1], name, arguments, folder=tmp_path), {}, False, tmp_path)
        for name in ("fp16", "bf16")
    ]
    assert rows[0].figures["useful tokens"] == (4.0, "tokens/s")
    assert rows[1].error.endswith("a step was not applied")
