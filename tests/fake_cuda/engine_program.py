"""Runs steps of the engine on fake CUDA tensors as rank 0 of a fake process group and prints the findings as JSON.

    python tests/fake_cuda/engine_program.py SHIM WORLD_SIZE '[["configs/quickstart.yaml", 3, "bf16"], ...]'

Each entry is a recipe, a ZeRO stage and a number format. The step is that of the recipe's first stage, or of the first
one with teachers or preferences. DeepSpeed runs as on CUDA: its accelerator for the CPU names CUDA devices. Numbers of
the host are summed as if all ranks had those of rank 0. Initial values are not written: fake tensors have none.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fake_cuda.program import ROOT, load_shim, microbatches, outside_of_fake_mode, told


class Event:
    """Takes the place of ``torch.cuda.Event``."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def no_reason(loss: float, norm: float) -> None:
    """Reject no update, as the detector of bad steps."""


def keep_parameters(self: Any, function: Any, recurse: bool = True) -> Any:
    """Take the place of ``Module._apply``, which fails on fake tensors. The conversion must change nothing."""
    for name, parameter in self.named_parameters():
        made = function(parameter.data)
        assert (made.dtype, made.device) == (parameter.dtype, parameter.device), f"{name} is not where it belongs"
    return self


def main() -> None:
    shim, size, entries = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    load_shim(shim)
    import torch
    import torch.distributed as torch_dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    variables = {"RANK": "0", "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(variables, DS_ACCELERATOR="cpu", DS_LOG_LEVEL="warning", MASTER_PORT="29500")
    torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(size))
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    from tests.fake_cuda import contracts

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = type(get_accelerator())
    with ExitStack() as stack:
        for owner, name, replacement in (
            (accelerator, "device_name", lambda self, index=None: "cuda" if index is None else f"cuda:{index}"),
            (accelerator, "current_device_name", lambda self: "cuda:0"),
            (accelerator, "current_device", lambda self: 0),
            (accelerator, "is_fp16_supported", lambda self: True),
            (accelerator, "on_accelerator", lambda self, tensor: tensor.device.type == "cuda"),
            (partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None),
            (torch.nn.Module, "_apply", keep_parameters),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "Event", Event),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(contracts.installed())  # Once: it forgets the modules that are imported meanwhile.
        fake = FakeTensorMode()  # One for all: modules cache tables of positions.
        print(json.dumps([run(fake, int(size), *entry) for entry in entries]))


def run(fake: Any, size: int, recipe: str, zero_stage: int, precision: str) -> dict[str, Any]:
    """Return the findings of a step of a recipe, and whether it was applied."""
    from mmscale.cli.run_file import load_run
    from mmscale.shrink.run import shrink_run
    from tests.fake_cuda.observer import Observer

    whole = load_run(ROOT / recipe, []).value
    config, observer = shrink_run(whole), Observer(fake)
    attention = "sdpa" if precision == "fp32" else "flash"
    changes = {"zero_stage": zero_stage, "precision": precision, "device": "cuda", "attention": attention}
    config = config.model_copy(update={"engine": config.engine.model_copy(update=changes)})
    number = next((number for number, stage in enumerate(whole.stages) if stage.distill or stage.preference), 0)
    stage, applied, error = whole.stages[number], False, ""
    shares = [1.0] if stage.preference else [teacher.weight for teacher in stage.distill]
    try:
        applied = step(config, number, shares, fake, observer, size)
    except Exception as raised:  # The test shows it.
        error = told(raised)
    found = [[*key, count] for key, count in sorted(observer.found.items())]
    return {"applied": applied, "error": error, "found": found}


def step(config: Any, number: int, shares: list[float], fake: Any, observer: Any, size: int) -> bool:
    """Make one step of a stage with two microbatches and a teacher for each share. Return whether it was applied."""
    import torch
    import torch.distributed as torch_dist

    from data_pipeline.batch import map_batch
    from mmscale import dist
    from mmscale.dist import World
    from mmscale.engine import construct, engine
    from mmscale.engine.precision import Precision
    from mmscale.models.build import build_unset
    from mmscale.nn import patch_embed
    from mmscale.objectives.choice import choose_objective
    from mmscale.objectives.teacher import Teacher
    from tests.fake_cuda.observer import fake_constructors

    settings, chosen = config.engine, Precision(config.engine.precision, "of the test")
    device, model_config, stage = torch.device("cuda", 0), config.stage_model(number), config.stages[number]
    world, batches = World(0, size, 0, device), microbatches(config, number)[-2:]

    def build() -> Any:
        with device:
            return build_unset(model_config, attention=settings.attention, dtype=chosen.dtype)

    def reduce(_: World, values: Any, operation: Any) -> list[float]:
        return [float(value) * (size if operation == torch_dist.ReduceOp.SUM else 1) for value in values]

    with ExitStack() as stack:
        for owner in (engine, construct):
            stack.enter_context(mock.patch.object(owner, "choose_precision", return_value=chosen))
        stack.enter_context(mock.patch.object(patch_embed, "buckets", outside_of_fake_mode(patch_embed.buckets)))
        stack.enter_context(mock.patch.object(dist, "_reduce", reduce))
        stack.enter_context(mock.patch.object(dist, "gather_numbers", lambda _, value: [value] * size))
        for context in (fake, observer):
            stack.enter_context(context)
        with fake_constructors(fake, observer):
            model = construct.construct(build, settings, world, lambda model, gather: None)
            frozen = [construct.construct(build, settings, world, lambda model, gather: None) for _ in shares]
        # DeepSpeed replaces and restores ``torch.tensor`` meanwhile.
        stack.enter_context(fake_constructors(fake, observer))
        teachers = [Teacher(each, share, 1.0) for each, share in zip(frozen, shares, strict=True)]
        objective = choose_objective(model_config, stage, world, teachers)
        trained = engine.Engine(model, objective, stage, settings, world)
        observer.found.clear()  # Waits before the first step do not matter.
        report = trained.train_step([map_batch(batch, torch.Tensor, fake.from_tensor) for batch in batches], no_reason)
        trained.close()
    return report.applied


if __name__ == "__main__":
    main()
