"""Copies, collectives and waits of one GPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

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
def test_a_step_waits_only_where_listed(gpu: torch.device) -> None:
    """CUDA reports each wait of the host in forward and backward pass: only those of tests/fake_cuda are there."""
    from tests.fake_cuda.test_fake_cuda import KNOWN

    config = load(ROOT / "tests/system/tiny.yaml", ["model.decoder.num_layers=2", "model.connector.every=2"], RunConfig)
    model: Any = build_model(config.value.model, seed=0).to(gpu, torch.bfloat16)
    objective = choose_objective(config.value.model, config.value.stages[0], World(0, 1, 0, gpu), ())
    batch = batch_of(config.value).to(gpu)
    objective(model, batch).loss_sum.backward()  # The first pass makes tables and allocates.
    is_cuda = gpu.type == "cuda"
    with warnings.catch_warnings(record=True) as caught, waits_are_warnings() if is_cuda else nullcontext():
        warnings.simplefilter("always")
        objective(model, batch).loss_sum.backward()
    places = [f"{w.filename.rpartition('/mmscale/')[2]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    listed = {place.split()[0] for kind, place in KNOWN if kind == "waits"}
    assert [place for place in places if place.split(":")[0] not in listed] == []


class waits_are_warnings:  # noqa: N801
    """Inside this context torch warns of each synchronisation of the host with the device."""

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


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
