"""The message for running out of memory: the phase, and the keys that reduce memory. The allocations really fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from data_pipeline.errors import out_of_memory
from mmscale.cli.console import exit_code_of
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.engine.memory import explain_memory

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
    assert explain_memory(error, EngineConfig(), World(0, 1, 0, torch.device("cpu")), 8, "forward", 1) is None


def test_only_remedies_that_would_change_something_are_named() -> None:
    error = failure(lambda: torch.empty(PETABYTE, dtype=torch.uint8))
    cpu, gpu = World(0, 1, 0, torch.device("cpu")), World(3, 8, 3, torch.device("cuda", 3))
    small = str(explain_memory(error, EngineConfig(activation_checkpointing=True), cpu, 256, "evaluation", 7))
    assert "rank 0 ran out of memory in the evaluation after step 7" in small
    assert "lower data.packing.max_tokens (256)" in small
    for key in ("micro_lanes (", "activation_checkpointing", "offload", "zero_stage", "background"):
        assert key not in small
    engine = EngineConfig(zero_stage=2, micro_lanes=4)
    large = str(explain_memory(error, engine, gpu, 4096, "checkpoint", 7))
    assert "rank 3 ran out of memory while it saved a checkpoint after step 7" in large
    assert "microbatches of up to 4 x 4096 tokens" in large
    for key in ("engine.micro_lanes (4)", "activation_checkpointing=true", "engine.offload", "engine.zero_stage (2)"):
        assert key in large


def test_remedies_of_the_set_up_do_not_concern_the_batch() -> None:
    error = failure(lambda: torch.empty(PETABYTE, dtype=torch.uint8))
    gpu = World(3, 8, 3, torch.device("cuda", 3))
    said = str(explain_memory(error, EngineConfig(zero_stage=2, micro_lanes=4), gpu, 4096, "start", 0))
    assert "while it set up the engine (" in said
    assert "engine.zero_stage (2)" in said
    assert "a smaller model" in said
    for word in ("micro", "activation_checkpointing", "max_tokens", "4096"):
        assert word not in said
