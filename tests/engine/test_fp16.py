"""fp16: rejected on a CPU; if forced, an overflow lowers the loss scale, and a checkpoint restores it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mmscale.engine.config import EngineConfig
from mmscale.engine.precision import choose_precision
from mmscale.errors import UnsupportedError
from tests.engine.fp16 import TOO_LARGE
from tests.engine.ranks import run_ranks
from tests.engine.toy import ToyObjective, toy_batch, toy_model


def test_a_cpu_refuses_it_at_once() -> None:
    with pytest.raises(UnsupportedError, match="only CUDA devices"):
        choose_precision(EngineConfig(precision="fp16"), torch.device("cpu"))


def test_stage_0_refuses_it() -> None:
    with pytest.raises(ValidationError, match="does not scale the loss"):
        EngineConfig(precision="fp16", zero_stage=0)


@pytest.mark.dist
@pytest.mark.resume
def test_the_scale_falls_and_resumes(tmp_path: Path) -> None:
    zeros = [2, 3]
    arguments = {"zeros": zeros, "directory": str(tmp_path)}
    answers = run_ranks("tests.engine.fp16:scaled_cases", 2, arguments)[0]
    batches = [toy_batch(0, lane) for lane in range(4)]
    total = sum(ToyObjective()(toy_model(), batch).loss_sum.item() for batch in batches)
    for zero, answer in zip(zeros, answers, strict=True):
        assert answer["first"][0][0] == pytest.approx(total / sum(batch.weight for batch in batches), rel=2e-3)
        assert answer["refused"] == [False, False]
        # DeepSpeed tolerates the first overflow and halves the scale at the second.
        expected = {"cur_scale": TOO_LARGE / 2, "cur_iter": 3, "last_overflow_iter": 2, "cur_hysteresis": 1}
        assert answer["scaler"] == expected, zero
        assert (answer["restored"], answer["restored_scaler"]) == (answer["saved"], answer["scaler"])
        assert answer["resumed"] == answer["after"]
