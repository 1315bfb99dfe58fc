"""Several stages: frozen weights stay, the next stage gets the weights, and a kill inside a stage changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmscale.checkpoint import list_checkpoints, load_weights
from mmscale.config import load
from mmscale.models.build import build_model
from mmscale.run.config import RunConfig
from tests.system.conftest import REPO, MakeRun, kill_group
from tests.system.test_resume import curve

STAGES = REPO / "tests/system/stages.yaml"


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = build_model(load(STAGES, [], RunConfig).value.model)
    load_weights(model, checkpoint)
    return dict(model.named_parameters())


@pytest.mark.dist
@pytest.mark.resume
def test_stage_program_freezes_hands_on_and_resumes(fork_run: MakeRun) -> None:
    whole = fork_run("whole", 2, config=STAGES)
    whole.finish()
    lines = whole.metrics()
    assert [line["stage"] for line in lines] == ["read"] * 6 + ["align"] * 6 + ["everything"] * 6
    assert set(lines[0]) & {"lr/vision", "lr/decoder"} == {"lr/decoder"}
    assert set(lines[6]) & {"lr/vision", "lr/decoder"} == {"lr/vision"}

    after_read, after_align, after_all = (weights(path) for path in list_checkpoints(whole.folder / "checkpoints"))
    for name, value in after_read.items():
        is_decoder = name.startswith(("decoder.", "head."))
        assert torch.equal(value, after_align[name]) == is_decoder, name
        assert not torch.equal(after_align[name], after_all[name]), name

    killed = fork_run("killed", 2, "checkpoint.every_steps=2", config=STAGES)
    process = killed.start()
    killed.wait_for_step(process, 9)
    kill_group(process)
    killed.finish()
    assert curve(killed) == curve(whole)
