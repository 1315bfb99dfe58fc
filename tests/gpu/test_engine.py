"""The engine on a GPU takes the steps of fp32 at ZeRO stage 0 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmscale.nn.attention_backends import AttentionChoice
from tests.gpu.programs import MOE, OPTIMIZER, RESUME, STAND_INS, Overrides, run_cases

BF16, FP16 = {"engine.precision": "bf16"}, {"engine.precision": "fp16"}
ADAM8 = {"kind": "adamw", "state_bits": 8}
EQUAL, HALF = {"loss": 1e-3, "grad_norm": 5e-3}, {"loss": 2e-2, "grad_norm": 0.1}
"""Relative bounds in fp32 and in 16 bits. The rehearsal's worst loss differs by 4e-3 in bf16."""
REFERENCES: dict[str, Overrides] = {
    "pairs": {"engine.zero_stage": 0},
    "experts": {"engine.zero_stage": 0, **MOE},
    "muon": {"engine.zero_stage": 0, OPTIMIZER: {"kind": "muon"}},
    "adafactor": {"engine.zero_stage": 0, OPTIMIZER: {"kind": "adafactor"}},
    "8-bit AdamW": {"engine.zero_stage": 0, OPTIMIZER: ADAM8},
}
CASES: dict[str, tuple[str, dict[str, float], Overrides]] = {
    "fp32, stage 0, fused AdamW": ("pairs", EQUAL, {"engine.zero_stage": 0}),
    "fp32, stage 3": ("pairs", EQUAL, {"engine.zero_stage": 3}),
    "bf16, stage 0": ("pairs", HALF, BF16 | {"engine.zero_stage": 0}),
    "bf16, stage 1": ("pairs", HALF, BF16 | {"engine.zero_stage": 1}),
    "bf16, stage 2": ("pairs", HALF, BF16 | {"engine.zero_stage": 2}),
    "bf16, stage 3": ("pairs", HALF, BF16 | {"engine.zero_stage": 3}),
    "bf16, stage 3, recomputed": ("pairs", HALF, BF16 | {"engine.activation_checkpointing": True}),
    "bf16, stage 3, resumed": ("pairs", HALF, BF16 | {RESUME: True}),
    "fp16, stage 2": ("pairs", HALF, FP16 | {"engine.zero_stage": 2}),
    "fp16, stage 3": ("pairs", HALF, FP16 | {"engine.zero_stage": 3}),
    "bf16, stage 2, optimizer on the host": (
        "pairs",
        HALF,
        BF16 | {"engine.zero_stage": 2, "engine.offload": "optimizer"},
    ),
    "bf16, stage 3, optimizer on the host": ("pairs", HALF, BF16 | {"engine.offload": "optimizer"}),
    "bf16, stage 3, all on the host": ("pairs", HALF, BF16 | {"engine.offload": "optimizer_and_weights"}),
    "fp32, stage 3, resumed with the host's optimizer": (
        "pairs",
        EQUAL,
        {"engine.offload": "optimizer", RESUME: True},
    ),
    "fp32, stage 3, Muon": ("muon", EQUAL, {OPTIMIZER: {"kind": "muon"}}),
    "fp32, stage 3, Adafactor": ("adafactor", EQUAL, {OPTIMIZER: {"kind": "adafactor"}}),
    "fp32, stage 3, 8-bit AdamW": ("8-bit AdamW", EQUAL, {OPTIMIZER: ADAM8}),
    "bf16, stage 0, grouped experts": ("experts", HALF, BF16 | MOE | {"engine.zero_stage": 0}),
    "bf16, stage 3, grouped experts": ("experts", HALF, BF16 | MOE),
    "fp16, stage 3, experts one by one": ("experts", HALF, FP16 | MOE),
}
CLOCKED = "bf16, stage 3, resumed"
REHEARSED = (
    CLOCKED,
    "fp32, stage 0, fused AdamW",
    "fp16, stage 3",
    "bf16, stage 3, all on the host",
    "bf16, stage 3, grouped experts",
)
"""Cases of the rehearsal on the CPU. The others have the marker ``slow`` and run the same code with other values."""
KERNELS: dict[str, AttentionChoice] = {
    "bf16, flash-attn": "flash",
    "bf16, torch varlen": "torch_varlen",
    "bf16, SDPA": "sdpa",
}


def selected(request: pytest.FixtureRequest) -> set[str]:
    """Return the cases of all tests of this module that will run."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return {item.callspec.params["case"] for item in here} | {CLOCKED}


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    names = {CASES[case][0] for case in selected(request) if case in CASES} | {"pairs"}
    return run_cases("cpu", {name: REFERENCES[name] for name in names})


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """All cases, in one process on the device."""
    rehearsed = request.config.getoption("--rehearse-gpu")
    if not rehearsed and not torch.cuda.is_available():
        return {}
    every = {name: overrides for name, (_, _, overrides) in CASES.items()}
    every |= {name: BF16 | {"engine.attention": kernel} for name, kernel in KERNELS.items()}
    cases = {name: dict(overrides) for name, overrides in every.items() if name in selected(request)}
    if rehearsed:
        for name, overrides in cases.items():
            # Host offload needs the CPU's own optimizer: the stand-in would replace it too.
            overrides[STAND_INS] = "host" not in name
    return run_cases("cpu" if rehearsed else "cuda", cases)


def assert_equal(found: dict[str, Any], expected: dict[str, Any], bounds: dict[str, float]) -> None:
    assert "error" not in found, f"{found.get('error')}\n{found.get('trace')}"
    assert all(found["applied"])
    for name, bound in bounds.items():
        assert found[name] == pytest.approx(expected[name], rel=bound), name


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in REHEARSED else [pytest.mark.slow]) for name in CASES]
)
def test_steps_equal_those_of_the_cpu(
    gpu: torch.device, references: dict[str, Any], results: dict[str, Any], case: str
) -> None:
    """ZeRO stages, bf16, fp16, offload, recomputation, experts, optimizers, checkpoints: losses of the CPU."""
    reference, bounds, _ = CASES[case]
    assert_equal(results[case], references[reference], bounds)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.flash] if name.endswith("flash-attn") else []) for name in KERNELS]
)
def test_steps_with_each_kernel_equal_those_of_the_cpu(
    gpu: torch.device, references: dict[str, Any], results: dict[str, Any], case: str
) -> None:
    """``engine.attention`` with each kernel: losses and norms of the CPU."""
    assert_equal(results[case], references["pairs"], HALF)


@pytest.mark.gpu
def test_the_clock_measures_every_phase(gpu: torch.device, results: dict[str, Any]) -> None:
    """CUDA events give the seconds of forward pass, backward pass and update; the device's memory is counted."""
    found = results[CLOCKED]
    assert all(seconds > 0 for phases in found["phases"] for seconds in phases)
    assert (found["device_bytes"] > 0) == (gpu.type == "cuda")
