"""Copies, collectives and waits of one GPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.batch import MultimodalBatch
from mmscale.check.batches import BatchMaker
from mmscale.config import load
from mmscale.dist import World
from mmscale.models.build import build_model, media_spec
from mmscale.nn.host import to_device
from mmscale.objectives.choice import choose_objective
from mmscale.run.config import RunConfig
from tests.gpu.programs import ROOT

COLLECTIVES = """
import sys, torch, torch.distributed as dist
from mmscale.dist import all_reduce_max, all_reduce_sum, all_reduce_sum_list, gather_numbers, init_distributed, shutdown
from mmscale.engine.config import EngineConfig
world = init_distributed(EngineConfig(device=sys.argv[1], timeout_seconds=60))
for dtype in (torch.float32, torch.bfloat16, torch.int64):
    values = torch.arange(1000, device=world.device).to(dtype)
    expected = values.clone()
    dist.all_reduce(values)
    assert torch.equal(values, expected), dtype
    whole = torch.empty_like(values)
    dist.all_gather_into_tensor(whole, values)
    part = torch.empty_like(values)
    dist.reduce_scatter_tensor(part, whole)
    assert torch.equal(part, expected), dtype
assert all_reduce_sum_list(world, [1.5, 2.0]) == [1.5, 2.0]
assert gather_numbers(world, 3.0) == [3.0]
print(dist.get_backend())
shutdown(world)
"""


@pytest.mark.gpu
def test_collectives_of_one_rank(gpu: torch.device) -> None:
    """NCCL starts and reduces, gathers and scatters fp32, bf16 and int64; numbers of the host go through gloo."""
    words = [sys.executable, "-c", COLLECTIVES, gpu.type]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == ("nccl" if gpu.type == "cuda" else "gloo")


@pytest.mark.gpu
def test_copies_from_pinned_memory_have_the_values_of_the_host(gpu: torch.device) -> None:
    """A source that is overwritten at once after ``to_device`` does not change the copy on the device."""
    copies = []
    for number in range(20):
        source = torch.full((1 << 18,), number)
        copies.append(to_device(source if gpu.type == "cuda" else source.clone(), gpu))
        if gpu.type == "cuda":
            source.fill_(-1)
    assert [int(copy.min()) for copy in copies] == [int(copy.max()) for copy in copies] == list(range(20))


WAIT = "called a synchronizing CUDA operation"
"""Text of torch's warning (c10/cuda/CUDAFunctions.cpp)."""


def batch_of(config: RunConfig) -> MultimodalBatch:
    maker = BatchMaker(media_spec(config.model), config.model.decoder.vocab_size, 0)  # type: ignore[union-attr]
    return replace(maker.make(maker.kinds[0], 0, 0), dropout_key=(0, 0))


@pytest.mark.gpu
def test_a_batch_arrives_whole(gpu: torch.device) -> None:
    """``MultimodalBatch.to`` copies every tensor, asynchronously from pinned memory, with equal values."""
    batch = batch_of(load(ROOT / "tests/system/tiny.yaml", [], RunConfig).value)
    there = batch.to(gpu, non_blocking=True)
    assert torch.equal(there.token_ids.cpu(), batch.token_ids)
    assert torch.equal(there.segments.cu.cpu(), batch.segments.cu)
    for name, block in batch.media.items():
        assert torch.equal(there.media[name].values.cpu(), block.values)
        assert there.media[name].values.device.type == gpu.type


@pytest.mark.gpu
@pytest.mark.parametrize("plant", ["", "item"], ids=["as it is", "with a planted wait"])
def test_a_step_waits_only_where_listed(gpu: torch.device, plant: str) -> None:
    """CUDA reports each wait of the host in forward and backward pass: none but a planted one."""
    from tests.fake_cuda import planted

    config = load(ROOT / "tests/system/tiny.yaml", ["model.decoder.num_layers=2", "model.connector.every=2"], RunConfig)
    model: Any = build_model(config.value.model, seed=0, dtype=torch.bfloat16).to(gpu, torch.bfloat16)
    objective = choose_objective(config.value.model, config.value.stages[0], World(0, 1, 0, gpu), ())
    batch = batch_of(config.value).to(gpu)
    with planted.active(plant):
        objective(model, batch).loss_sum.backward()  # The first pass makes tables and allocates.
        with warnings.catch_warnings(record=True) as caught, waits_are_warnings(gpu):
            warnings.simplefilter("always")
            objective(model, batch).loss_sum.backward()
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in caught if WAIT in str(w.message)}
    if gpu.type == "cpu":  # There the loss compares the given rows with the weights.
        places = {place for place in places if not place.startswith("cross_entropy.py")}
    assert {place.partition(":")[0] for place in places} == ({"planted.py"} if plant else set()), places


@contextmanager
def waits_are_warnings(device: torch.device) -> Iterator[None]:
    """Inside this context torch warns of each synchronisation of the host with a CUDA device.

    In the rehearsal a stand-in warns of each operation on the CPU whose result the host would wait for.
    """
    if device.type == "cpu":
        with HostReads():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class HostReads(TorchDispatchMode):
    """Warns of operations that return values, or tensors whose sizes depend on values."""

    names = ("_local_scalar_dense", "nonzero.", "bincount", "masked_select", "_unique2", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = (kwargs or {}).get("output_size") is not None  # The host gives the size.
        if not known and str(func).startswith(tuple(f"aten.{name}" for name in self.names)):
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and frame.f_back is not None:
                frame = frame.f_back
            warnings.warn_explicit(WAIT, UserWarning, frame.f_code.co_filename, frame.f_lineno)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
def test_generation_equals_the_cpu(gpu: torch.device) -> None:
    """A forward pass in fp32 for generation and scoring gives the logits of the CPU."""
    config = load(ROOT / "tests/system/tiny.yaml", ["model.decoder.num_layers=2", "model.connector.every=2"], RunConfig)
    batch = batch_of(config.value)
    model: Any = build_model(config.value.model, seed=0).eval()
    with torch.no_grad():
        expected = model(batch).hidden
        found = model.to(gpu)(batch.to(gpu)).hidden
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
