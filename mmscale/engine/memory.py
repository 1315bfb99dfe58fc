"""The error message for a failed allocation: the phase in which it failed, what to lower, and by how much."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_pipeline.errors import out_of_memory
from mmscale.dist import World
from mmscale.engine.config import EngineConfig
from mmscale.errors import EngineError

_PHASES = {
    "start": "while it set up the engine",
    "data": "while it waited for the data of step {step}",
    "agreement": "between the phases of step {step}",
    "forward": "in the forward pass of step {step}",
    "backward": "in the backward pass of step {step}",
    "optimizer": "in the optimizer of step {step}",
    "checkpoint": "while it saved a checkpoint after step {step}",
    "evaluation": "in the evaluation after step {step}",
}


_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = r"([\d.]+) (bytes|[KMG]iB|B)\b"
_OPTIMIZER_BYTES = 12
"""Bytes per parameter of master weight and two moments in fp32."""


@dataclass(frozen=True)
class MemoryUse:
    """Sizes of a run, for the figures in the message.

    Attributes:
        max_tokens: Budget of a pack (``data.packing.max_tokens``).
        lanes: Rows of the global batch: the largest number of ranks.
        parameters: Number of parameters.
        tokens_per_forward: ``evaluation.tokens_per_forward``.
    """

    max_tokens: int
    lanes: int
    parameters: int
    tokens_per_forward: int


def explain_memory(
    error: BaseException, engine: EngineConfig, world: World, use: MemoryUse, phase: str, step: int
) -> EngineError | None:
    """Return the error to raise if an allocation failed; None for any other error.

    Args:
        error: The exception.
        engine: The ``engine`` block.
        world: This rank.
        use: Sizes of the run.
        phase: Current phase, as in ``Watchdog.current_phase``.
        step: Step of the run; 0 before the first.
    """
    reason = out_of_memory(error)
    if reason is None:
        return None
    doing = _PHASES.get(phase, "in {phase} of step {step}").format(phase=phase, step=step)
    held = f", with microbatches of up to {engine.micro_lanes} x {use.max_tokens} tokens" if _holds_batch(phase) else ""
    short = f"; {_size(missing)} more are needed" if (missing := missing_bytes(reason)) else ""
    return EngineError(
        f"rank {world.rank} ran out of memory {doing}{held} ({reason}){short}. "
        f"Less memory: {'; '.join(_remedies(engine, world, use, phase))}"
    )


def _holds_batch(phase: str) -> bool:
    """Whether memory in a phase depends on the microbatch. Set-up and evaluation run without one."""
    return phase not in ("start", "evaluation")


def missing_bytes(reason: str) -> int | None:
    """Return by how much an allocation exceeded the free memory; None if the message does not say what is free."""
    asked = re.search(rf"[Tt]ried to allocate {_SIZE}", reason)
    free = re.search(rf"{_SIZE} is free", reason)
    if asked is None or free is None:
        return None
    asked_bytes, free_bytes = (round(float(found[1]) * _UNITS[found[2]]) for found in (asked, free))
    return max(asked_bytes - free_bytes, 0) or None


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def state_bytes(engine: EngineConfig, parameters: int, ranks: int, zero_stage: int) -> float:
    """Return about how many bytes of weights, gradients and AdamW's state a rank holds on its device.

    All parameters are assumed to be trained. ``precision: auto`` counts as bf16.
    """
    width = 4 if engine.precision == "fp32" else 2
    weights = width / (ranks if zero_stage == 3 else 1)
    gradients = width / (ranks if zero_stage >= 2 else 1)
    optimizer = _OPTIMIZER_BYTES / (ranks if zero_stage >= 1 else 1)
    if engine.offload != "none":
        optimizer = 0
    if engine.offload == "optimizer_and_weights":
        weights = 0
    return parameters * (weights + gradients + optimizer)


def _remedies(engine: EngineConfig, world: World, use: MemoryUse, phase: str) -> list[str]:
    """Return the remedies that have an effect in this run. Those that allow a resume come first."""
    found = []
    ranks, zero = world.world_size, engine.zero_stage
    now = state_bytes(engine, use.parameters, ranks, zero)
    if phase == "evaluation":
        half = max(use.tokens_per_forward // 2, 1)
        found.append(f"lower evaluation.tokens_per_forward from {use.tokens_per_forward} to {half}")
    if engine.micro_lanes > 1 and _holds_batch(phase):
        fewer = engine.micro_lanes // 2
        found.append(
            f"lower engine.micro_lanes from {engine.micro_lanes} to {fewer}, which about halves the activations"
        )
    if not engine.activation_checkpointing and _holds_batch(phase):
        found.append("set engine.activation_checkpointing=true, which keeps one block's activations instead of all")
    if zero < 3 and ranks > 1:
        saved = now - state_bytes(engine, use.parameters, ranks, 3)
        found.append(f"raise engine.zero_stage from {zero} to 3, about {_size(saved)} less on each rank")
    if world.device.type == "cuda" and engine.offload != "optimizer_and_weights":
        to = "optimizer" if engine.offload == "none" and zero < 3 else "optimizer_and_weights"
        offloaded = engine.model_copy(update={"offload": to})
        saved = now - state_bytes(offloaded, use.parameters, ranks, zero)
        needed = " with engine.zero_stage=1" if zero == 0 else ""
        found.append(f"set engine.offload={to}{needed}, about {_size(saved)} less on the device")
    if phase == "checkpoint":
        found.append("set checkpoint.background=false")
    more = min(2 * ranks, use.lanes)
    if more > ranks:  # At stage 0 every rank holds everything, however many there are.
        saved = now - state_bytes(engine, use.parameters, more, max(zero, 1))
        stage = "" if zero else " with engine.zero_stage=1 or more"
        found.append(
            f"start {more} ranks instead of {ranks}{stage}, on more machines, about {_size(saved)} less on each"
        )
    if _holds_batch(phase):
        half = max(use.max_tokens // 2, 1)
        found.append(
            f"lower data.packing.max_tokens from {use.max_tokens} to {half}, in a new run_dir, since it changes the "
            "batches"
        )
    elif phase == "start":
        found.append("choose a smaller model, in a new run_dir")
    return found
