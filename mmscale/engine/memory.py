"""The error message for a failed allocation: the phase in which it failed, and the keys that reduce memory."""

from __future__ import annotations

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


def explain_memory(
    error: BaseException, engine: EngineConfig, world: World, max_tokens: int, phase: str, step: int
) -> EngineError | None:
    """Return the error to raise if an allocation failed; None for any other error.

    Args:
        error: The exception.
        engine: The ``engine`` block.
        world: This rank.
        max_tokens: Budget of a pack (``data.packing.max_tokens``).
        phase: Current phase, as in ``Watchdog.current_phase``.
        step: Step of the run; 0 before the first.
    """
    reason = out_of_memory(error)
    if reason is None:
        return None
    doing = _PHASES.get(phase, "in {phase} of step {step}").format(phase=phase, step=step)
    held = f", with microbatches of up to {engine.micro_lanes} x {max_tokens} tokens" if phase != "start" else ""
    return EngineError(
        f"rank {world.rank} ran out of memory {doing}{held} ({reason}). "
        f"Less memory: {'; '.join(_remedies(engine, world, max_tokens, phase))}"
    )


def _remedies(engine: EngineConfig, world: World, max_tokens: int, phase: str) -> list[str]:
    """Return the remedies that have an effect in this run. Those that allow a resume come first."""
    found = []
    holds_batch = phase != "start"  # The set-up of the engine allocates only weights and optimizer state.
    if engine.micro_lanes > 1 and holds_batch:
        found.append(f"lower engine.micro_lanes ({engine.micro_lanes})")
    if not engine.activation_checkpointing and holds_batch:
        found.append("set engine.activation_checkpointing=true")
    if engine.zero_stage < 3 and world.world_size > 1:
        found.append(f"raise engine.zero_stage ({engine.zero_stage})")
    if world.device.type == "cuda" and engine.offload != "optimizer_and_weights":
        found.append(f"move more to the host with engine.offload (now {engine.offload})")
    if phase == "checkpoint":
        found.append("set checkpoint.background=false")
    found.append("start more ranks, on more machines")
    if holds_batch:
        found.append(f"lower data.packing.max_tokens ({max_tokens}), in a new run_dir, since it changes the batches")
    else:
        found.append("choose a smaller model, in a new run_dir")
    return found
