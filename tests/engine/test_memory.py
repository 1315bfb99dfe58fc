"""The message for running out of memory: the phase, and the keys that reduce memory. The allocations really fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.errors import out_of_memory
from mmscale.cli.console import exit_code_of
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.memory import MemoryUse, explain_memory, state_bytes

PETABYTE = 1 << 50


def failure(allocate: Callable[[], object]) -> Exception:
    try:
        allocate()
    except Exception as error:
        return error
    raise AssertionError("the allocation did not fail")


@pytest.mark.parametrize(
    "error",
    [
        failure(lambda: torch.empty(PETABYTE, dtype=torch.uint8)),
        failure(lambda: np.empty(PETABYTE, np.uint8)),
        failure(lambda: bytearray(1 << 60)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_allocation_is_a_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of_memory(error)

    def run() -> None:
        raise error

    assert exit_code_of(run) == 1
    said = capsys.readouterr().err
    assert said.startswith("mmscale: out of memory (")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(5, "Input/output error"), KeyError("memory")])
def test_other_errors_are_not(error: Exception) -> None:
    assert out_of_memory(error) is None
    assert explain_memory(error, EngineConfig(), CPU, USE, "forward", 1) is None


CPU, GPU = World(0, 1, 0, torch.device("cpu")), World(3, 8, 3, torch.device("cuda", 3))
BILLION = 10**9
USE = MemoryUse(max_tokens=4096, lanes=16, parameters=BILLION, tokens_per_forward=8192)
"""A model of a billion parameters: 12 bytes each of optimizer state, 2 of weights, 2 of gradients in bf16."""


def explained(engine: EngineConfig, world: World, phase: str, use: MemoryUse = USE, said: str = "") -> str:
    error = torch.OutOfMemoryError(said) if said else failure(lambda: torch.empty(PETABYTE, dtype=torch.uint8))
    return str(explain_memory(error, engine, world, use, phase, 7))


def test_only_remedies_that_would_change_something_are_named() -> None:
    small = explained(EngineConfig(activation_checkpointing=True), CPU, "evaluation", replace(USE, lanes=1))
    assert "rank 0 ran out of memory in the evaluation after step 7 (" in small
    assert small.endswith("Less memory: lower evaluation.tokens_per_forward from 8192 to 4096")
    large = explained(EngineConfig(zero_stage=2, micro_lanes=4), GPU, "checkpoint")
    assert "rank 3 ran out of memory while it saved a checkpoint after step 7" in large
    assert "microbatches of up to 4 x 4096 tokens" in large
    for words in (
        "lower engine.micro_lanes from 4 to 2",
        "activation_checkpointing=true",
        "engine.offload=optimizer,",
        "raise engine.zero_stage from 2 to 3",
        "background=false",
        "start 16 ranks instead of 8, on more machines",
        "lower data.packing.max_tokens from 4096 to 2048, in a new run_dir",
    ):
        assert words in large, words


def test_remedies_of_the_set_up_do_not_concern_the_batch() -> None:
    said = explained(EngineConfig(zero_stage=2, micro_lanes=4), GPU, "start")
    assert "while it set up the engine (" in said
    assert "raise engine.zero_stage from 2 to 3" in said
    assert "a smaller model" in said
    for word in ("micro", "activation_checkpointing", "max_tokens", "4096"):
        assert word not in said


def test_more_ranks_help_only_where_they_share() -> None:
    """At ZeRO stage 0 every rank holds everything: more ranks alone save nothing."""
    alone = replace(USE, lanes=4)
    assert "start 2 ranks instead of 1 with engine.zero_stage=1 or more" in explained(
        EngineConfig(zero_stage=0), CPU, "forward", alone
    )
    # Half of 16 bytes for each of 10^9 parameters moves to the other rank at stage 3: 8e9 / 2^30 = 7.5 GiB.
    assert "start 2 ranks instead of 1, on more machines, about 7.5 GiB less on each" in explained(
        EngineConfig(zero_stage=3), CPU, "forward", alone
    )
    assert "ranks instead" not in explained(EngineConfig(zero_stage=3), GPU, "forward", replace(USE, lanes=8))


def test_a_full_gpu_says_by_how_much() -> None:
    """The text is that of torch 2.13's allocator."""
    said = explained(
        EngineConfig(zero_stage=1, micro_lanes=8),
        GPU,
        "backward",
        said="CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 79.15 GiB of which "
        "512.00 MiB is free. Including non-PyTorch memory, this process has 78.60 GiB memory in use.",
    )
    assert "in the backward pass of step 7" in said
    assert "; 2.0 GiB more are needed. Less memory: lower engine.micro_lanes from 8 to 4" in said
    # Stage 3 shards 4 bytes more of each parameter over 8 ranks: 4e9 * 7 / 8 / 2^30 = 3.3 GiB.
    assert "raise engine.zero_stage from 1 to 3, about 3.3 GiB less on each rank" in said
    # Offload moves the 12 bytes of optimizer state, of which each rank has an eighth: 1.4 GiB.
    assert "set engine.offload=optimizer, about 1.4 GiB less on the device" in said


def test_bytes_of_the_state() -> None:
    engine = EngineConfig(precision="bf16")
    assert [state_bytes(engine, 8, 4, stage) for stage in range(4)] == [8 * 16, 8 * (4 + 3), 8 * (2 + 3.5), 8 * 4]
    assert state_bytes(EngineConfig(precision="fp32", offload="optimizer_and_weights"), 8, 4, 3) == 8
