"""Runs one step of the engine on fake CUDA tensors as rank 0 of a fake process group and prints the findings as JSON.

    python tests/fake_cuda/engine_program.py SHIM RECIPE WORLD_SIZE ZERO_STAGE PRECISION

DeepSpeed runs as on CUDA: its accelerator for the CPU names CUDA devices. Numbers of the host are summed as if all
ranks had those of rank 0. Initial values are not written, since fake tensors have none.
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

from tests.fake_cuda.program import load_shim, outside_of_fake_mode


class Event:
    """Takes the place of ``torch.cuda.Event``."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def keep_parameters(self: Any, function: Any, recurse: bool = True) -> Any:
    """Take the place of ``Module._apply``, which fails on fake tensors. The conversion must change nothing."""
    for parameter in self.parameters():
        made = function(parameter.data)
        assert (made.dtype, made.device) == (parameter.dtype, parameter.device), "the model is not where it belongs"
    return self


def main() -> None:
    shim, recipe, size, stage, precision = sys.argv[1:]
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
        print(json.dumps(run(FakeTensorMode(), recipe, int(size), int(stage), precision)))


def run(fake: Any, recipe: str, size: int, zero_stage: int, precision: str) -> dict[str, Any]:
    """Return what the first step of a recipe's first stage reports, and the findings."""
    import torch
    import torch.distributed as torch_dist
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from data_pipeline.batch import map_batch
    from mmscale import dist
    from mmscale.check.batches import BatchMaker
    from mmscale.cli.run_file import load_run
    from mmscale.dist import World
    from mmscale.engine import construct, engine
    from mmscale.engine.precision import Precision
    from mmscale.models.build import build_unset
    from mmscale.nn import patch_embed
    from mmscale.objectives.choice import choose_objective
    from mmscale.shrink.run import shrink_run
    from tests.fake_cuda import contracts
    from tests.fake_cuda.observer import Observer, fake_constructors

    config = shrink_run(load_run(Path(recipe), []).value)
    changes = {"zero_stage": zero_stage, "precision": precision, "device": "cuda", "attention": "flash"}
    settings, chosen = config.engine.model_copy(update=changes), Precision(precision, "of the test")
    device, observer = torch.device("cuda", 0), Observer(fake)
    world = World(0, size, 0, device)
    maker = BatchMaker(config.stage_media(0), config.model.decoder.vocab_size, 0)  # type: ignore[union-attr]

    def build() -> Any:
        with device:
            return build_unset(config.model, attention="flash", dtype=chosen.dtype)

    def reduce(_: World, values: Any, operation: Any) -> list[float]:
        return [float(value) * (size if operation == torch_dist.ReduceOp.SUM else 1) for value in values]

    with ExitStack() as stack:
        for owner in (engine, construct):
            stack.enter_context(mock.patch.object(owner, "choose_precision", return_value=chosen))
        stack.enter_context(mock.patch.object(patch_embed, "buckets", outside_of_fake_mode(patch_embed.buckets)))
        stack.enter_context(mock.patch.object(dist, "_reduce", reduce))
        for context in (contracts.installed(), fake, observer):
            stack.enter_context(context)
        with fake_constructors(fake, observer):
            model = construct.construct(build, settings, world, lambda model, gather: None)
        # DeepSpeed replaces and restores ``torch.tensor`` meanwhile.
        stack.enter_context(fake_constructors(fake, observer))
        objective = choose_objective(config.model, config.stages[0], world, ())
        trained = engine.Engine(model, objective, config.stages[0], settings, world)
        with unset_fake_temporarily():
            real = [maker.make(kind, 0, lane) for lane, kind in enumerate(maker.kinds[:2])]
        observer.found.clear()  # Waits before the first step do not matter.
        report = trained.train_step([map_batch(batch, torch.Tensor, fake.from_tensor) for batch in real])
    return {"applied": report.applied, "found": [[*key, count] for key, count in sorted(observer.found.items())]}


if __name__ == "__main__":
    main()
