"""A stage of preference optimisation after another stage: it prefers the chosen answers, and resumes bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import DatasetConfig
from data_pipeline.packing.collate import collate
from data_pipeline.packing.document_builder import DocumentBuilder
from data_pipeline.packing.packer import Pack
from data_pipeline.shards.sample_reader import read_samples
from data_pipeline.text.tokenizer import load_tokenizer
from mmscale.checkpoint import load_weights
from mmscale.config import load
from mmscale.models.build import build_model
from mmscale.objectives.preference import Preference
from mmscale.objectives.teacher import Teacher
from mmscale.run.config import RunConfig
from tests.system.conftest import MakeRun, kill_group

CONFIG = Path(__file__).with_name("preference.yaml")
HELD_OUT = Path("examples/text/shards/pairs-heldout.manifest")


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the values that must be equal: all but time and memory."""
    names = ("step", "stage", "loss", "grad_norm", "tokens", "samples")
    return [{k: v for k, v in line.items() if k in names or k.startswith("metric/")} for line in lines]


@torch.no_grad()
def held_out(config: RunConfig, model: Path, reference: Path) -> dict[str, float]:
    """Return the means over 64 held-out pairs of a model's metrics against its reference."""
    data, stage = config.stage_data(1), config.stages[1]
    assert stage.preference is not None
    networks = []
    for path in (model, reference):
        networks.append(build_model(config.stage_model(1), attention="sdpa").eval())
        load_weights(networks[-1], path)
    template = data.datasets[0].template
    dataset = DatasetConfig(name="held-out", manifest=HELD_OUT, template=template)
    builder = DocumentBuilder(dataset, load_tokenizer(data.tokenizer), config.stage_media(1))
    documents = [builder(sample) for sample, _ in zip(read_samples(HELD_OUT), range(64), strict=False)]
    objective = Preference(stage.preference, [Teacher(networks[1], 1.0, 1.0)])
    batch = collate([Pack(tuple(documents), 0)], config.stage_media(1))
    output = objective(networks[0], batch)
    return {name: float(value) / len(documents) for name, value in output.metrics.items()}


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.dist
def test_held_out_margins_rise_and_a_killed_run_resumes_bit_for_bit(fork_run: MakeRun) -> None:
    whole = fork_run("whole", 2, config=CONFIG)
    whole.finish()
    first = whole.metrics()[4]
    assert first["stage"] == "prefer"
    assert first["metric/preference"] == pytest.approx(math.log(2))  # The model is still its own reference.
    assert first["metric/reward_margin"] == 0

    config = load(CONFIG, [f"run_dir={whole.folder}"], RunConfig).value
    start, end = whole.folder / "references" / "prefer", whole.folder / "checkpoints" / "step-00000012"
    before, after = (held_out(config, path, start) for path in (start, end))
    assert before["reward_margin"] == 0
    assert after["reward_margin"] > 0.1
    assert after["reward_accuracy"] > 0.5

    killed = fork_run("killed", 2, config=CONFIG)
    process = killed.start(slow_from=11)
    killed.wait_for_step(process, 9)  # After the checkpoint of step 8, which replaced that of the stage's beginning.
    kill_group(process)
    assert not (killed.folder / "checkpoints" / "step-00000004").exists()
    assert killed.metrics()[-1]["step"] < 12, "the run was over before it was killed"
    killed.finish()
    assert curve(killed.metrics()) == curve(whole.metrics())
    weights = [file.read_bytes() for file in sorted(end.glob("rank-*.safetensors"))]
    again = killed.folder / "checkpoints" / end.name
    assert [file.read_bytes() for file in sorted(again.glob("rank-*.safetensors"))] == weights
