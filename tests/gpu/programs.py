"""Training steps of the engine on one device, in a process of its own: DeepSpeed chooses the device once a process.

    python -m tests.gpu.programs DEVICE '{"name": {"engine.precision": "bf16", ...}, ...}'

Prints one JSON object: for each case the losses and gradient norms of its steps, and the error of a case that failed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3
Overrides = dict[str, Any]
LOSS_SCALE = 2.0**8
"""Start of the loss scale in fp16: that of DeepSpeed, 65536, overflows in the first steps of any run."""
TINY: Overrides = {
    "data.lanes": 1,
    "model.decoder.num_layers": 2,
    "model.connector.every": 2,
    "model.vision.num_layers": 1,
}
RESUME = "resume"
"""Key of a case: save after half of the steps and continue in another engine."""
OPTIMIZER = "optimizer"
"""Key of a case: the stage's optimizer block."""
STAND_INS = "stand_ins"
"""Key of a case on the CPU: CUDA kernels are stand-ins that check their preconditions."""
MOE = {
    "stages.0.train": ["decoder"],
    "model.vision": None,
    "model.connector": None,
    "model.decoder.mlp": {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_dim": 64},
    "data.datasets": [
        {"name": "text", "manifest": "examples/emoji/shards/train-text.manifest", "template": {"kind": "text"}}
    ],
}
"""Changes of the tiny run to a text model with experts."""


def run_cases(device: str, cases: dict[str, Overrides]) -> dict[str, dict[str, Any]]:
    """Run cases in a new process and return their results."""
    words = [sys.executable, "-m", "tests.gpu.programs", device, json.dumps(cases)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def main() -> None:
    from mmscale.cli.console import exit_process
    from mmscale.dist import init_distributed, shutdown
    from mmscale.engine.config import EngineConfig

    device, cases = sys.argv[1], json.loads(sys.argv[2])
    world, results = init_distributed(EngineConfig(device=device, timeout_seconds=120)), {}
    for name, overrides in cases.items():
        try:
            results[name] = train(world, device, overrides)
        except Exception as error:  # The test of this case shows it; the others still run.
            results[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
    shutdown(world)
    print(json.dumps(results), flush=True)
    exit_process(0)


def train(world: Any, device: str, overrides: Overrides) -> dict[str, Any]:
    """Return what each step of the tiny run reports."""
    import torch

    from mmscale.checkpoint import resume, save
    from mmscale.config import load
    from mmscale.engine.step_clock import BACKWARD, FORWARD
    from mmscale.engine.step_clock import OPTIMIZER as UPDATE
    from mmscale.run.config import RunConfig
    from mmscale.run.session import open_loader
    from tests.checkpoint.programs import state_of
    from tests.engine.fp16 import forced
    from tests.fake_cuda import contracts

    overrides = dict(overrides)
    stand_ins = contracts.installed() if overrides.pop(STAND_INS, False) else nullcontext()
    resumes, optimizer = overrides.pop(RESUME, False), overrides.pop(OPTIMIZER, None)
    written = {**TINY, "engine.device": device, "engine.precision": "fp32", **overrides}
    force = device == "cpu" and written["engine.precision"] == "fp16"
    if force:
        written["engine.precision"] = "fp32"
    without = [block for block in ("model.vision", "model.connector") if written.get(block, ...) is None]
    words = [
        f"{key}={json.dumps(value)}"
        for key, value in written.items()
        if not key.startswith(tuple(f"{b}." for b in without))
    ]
    config = load(ROOT / "tests/system/tiny.yaml", words, RunConfig).value
    stage = config.stages[0].model_dump() | {"schedule": "constant", "warmup_steps": 0}
    stage = type(config.stages[0]).model_validate(stage | ({"optimizer": optimizer} if optimizer else {}))
    with closing(open_loader(config, world)) as loader:
        batches = [batch.microbatches for batch in itertools.islice(loader, STEPS)]
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "applied": [], "phases": []}
    with stand_ins, forced(world) if force else nullcontext(), tempfile.TemporaryDirectory() as folder:
        engine = start(config, stage, world)
        if (scaler := engine.loss_scaler_state()) is not None:
            engine.set_loss_scaler_state({**scaler, "cur_scale": LOSS_SCALE})
        for step, batch in enumerate(batches):
            if resumes and step == STEPS - 1:
                path = save(engine, state_of(world, step), Path(folder))
                engine.close()
                engine = start(config, stage, world)
                resume(engine, path)
            report = engine.train_step([replace(each, dropout_key=(0, step)) for each in batch])
            found["loss"].append(report.loss)
            found["grad_norm"].append(report.grad_norm)
            found["applied"].append(report.applied)
            found["phases"].append([report.spans.seconds.get(name, 0.0) for name in (FORWARD, BACKWARD, UPDATE)])
        engine.close()
    found["device_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return found


def start(config: Any, stage: Any, world: Any) -> Any:
    """Return an engine with the initial weights of the run."""
    from mmscale.engine.engine import Engine
    from mmscale.objectives.choice import choose_objective
    from mmscale.run.train import build

    # ``resolve_backend`` asks torch for CUDA. On the CPU a named kernel is a stand-in.
    named = config.engine.attention in ("flash", "torch_varlen") and world.device.type == "cpu"
    pretended = {"is_available": lambda: True, "get_device_capability": lambda: (9, 0)}
    with mock.patch.multiple("torch.cuda", **pretended) if named else nullcontext():
        model = build(config, world, 0)
    objective = choose_objective(config.model, stage, world, ())
    return Engine(model, objective, stage, config.engine, world)


if __name__ == "__main__":
    main()
