"""Goodput, phases and traces of whole runs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mmscale.engine.step_clock import reset_peak
from tests.system.conftest import DEEP, MakeRun, kill_group


@pytest.mark.resume
@pytest.mark.slow
def test_a_killed_run_accounts_for_its_wall_time(make_run: MakeRun) -> None:
    metrics = "metrics={grad_norms_every: 4, memory_every: 3, tensorboard: false, peak_flops: 1.0e+12}"
    run = make_run("killed", 1, *DEEP, "max_steps=9", metrics)
    began = time.time()
    process = run.start()
    run.wait_for_step(process, 7)  # Steps 6 and 7 are after the checkpoint of step 5.
    os.kill(process.pid, signal.SIGSTOP)
    vain = [line for line in run.metrics() if line["step"] > 5]
    kill_group(process)
    time.sleep(1.5)
    run.finish()
    ended = time.time()
    result = json.loads((run.folder / "result.json").read_text())
    goodput, efficiency = result["goodput"], result["efficiency"]
    lines = run.metrics()
    assert goodput["starts"] == 2
    assert goodput["repeated"] == pytest.approx(sum(line["seconds"] for line in vain))
    assert goodput["training"] == pytest.approx(sum(line["seconds"] - line["data_wait_seconds"] for line in lines))
    assert goodput["down"] >= 1.5
    assert 0 < goodput["wall"] <= ended - began + 0.02  # The start time has a resolution of 0.01 s.
    assert goodput["setup"] > 0.5, "importing torch alone takes longer"
    assert goodput["share"] == pytest.approx(goodput["training"] / goodput["wall"])
    assert efficiency["model_flops"] == sum(line["model_flops"] for line in lines)
    assert efficiency["mfu"] == pytest.approx(efficiency["model_flops"] / 1e12 / sum(line["seconds"] for line in lines))
    memory_has_marks = reset_peak(torch.device("cpu"))
    for line in lines:
        assert line["images"] == line["samples"] > 0, "each sample is a caption of one image"
        phases = sum(line[f"{name}_seconds"] for name in ("forward", "backward", "optimizer"))
        assert phases + line["data_wait_seconds"] <= line["seconds"]
        assert ("backward_peak_bytes" in line) == (line["step"] % 3 == 0 and memory_has_marks)
        norms = [value for key, value in line.items() if key.startswith("grad_norm/")]
        assert len(norms) == (3 if line["step"] % 4 == 0 else 0)
        if norms:
            assert sum(norm**2 for norm in norms) == pytest.approx(line["grad_norm"] ** 2, rel=1e-5)


def ranges(path: Path, name: str) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


@pytest.mark.dist
@pytest.mark.slow
def test_profile_of_two_ranks_shows_the_phases(make_run: MakeRun) -> None:
    small = ("metrics.profile_after_steps=1", "metrics.profile_steps=1", "data.lanes=4")
    run = make_run("traced", 2, "--profile", "max_steps=3", *small)
    output = run.finish()
    assert "wrote the trace of steps 2 to 2" in output
    paths = sorted((run.folder / "profile").iterdir())
    assert [path.name for path in paths] == [f"rank-{rank:05d}-steps-2-2.json" for rank in (0, 1)]
    for path in paths:
        # The preparation of a step is a forward phase, too.
        assert [ranges(path, phase) for phase in ("data", "forward", "backward", "optimizer")] == [1, 3, 2, 1]
        assert ranges(path, "aten::mm") > 0
    again = make_run("traced", 1, "--profile", "max_steps=3", *small).finish(code=2)
    assert "is finished" in again
