"""How a run uses its machines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.engine.watchdog import WatchdogConfig


class EngineConfig(StrictConfig):
    """Partitioning, precision, memory against time."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """What the ranks share out among themselves: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of weights and activations; masters, moments and the reduction of gradients are always fp32.
    ``auto``: bf16 where the hardware computes it natively (a CUDA device, or a CPU with AVX512-BF16 or AMX), fp32
    elsewhere. ``fp16`` scales the loss dynamically and needs a CUDA device and ZeRO stage 1 or more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; ``auto`` takes CUDA if torch sees it."""
    activation_checkpointing: bool = False
    """Forget the activations of each block and compute them again in the backward pass: about a third more time, far
    less memory."""
    attention: Literal["auto", "sdpa", "flash", "torch_varlen"] = "auto"
    """Attention backend, chosen once when the model is built; a named one that is missing raises."""
    micro_lanes: int = Field(default=1, ge=1)
    """Rows of the global batch that a rank computes at once. More: fewer, larger passes and more memory."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """What rests in the host's memory: nothing, masters and optimizer state (stages 1-3), or also the weights' shards
    (stage 3). On a CPU device it saves nothing and works all the same."""
    timeout_seconds: float = Field(default=600.0, gt=0, le=1e9)
    """Longest wait for another rank before it counts as lost."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Ends a run that hangs, with the name of the rank that the others wait for."""
    reduce_bucket_elements: int = Field(default=50_000_000, ge=1)
    """Gradient values that are reduced in one message."""
    gather_bucket_elements: int = Field(default=50_000_000, ge=1)
    """Weight values that are gathered ahead of time in one message (stages 1-3)."""
    persistent_parameter_elements: int = Field(default=0, ge=0)
    """Stage 3 keeps parameters of fewer values than this whole on every rank. Each then costs a message of its own
    after every step, while the others travel a block at a time."""
    live_parameter_elements: int = Field(default=1_000_000_000, ge=0)
    """Stage 3 leaves up to this many values whole between forward and backward pass. Fewer take less memory, and what
    was let go is gathered again; 0 holds the weights of one block at a time."""
    overlap_communication: bool = True
    """Reduce gradients while the backward pass goes on (CUDA; gloo has no streams to overlap)."""

    @model_validator(mode="after")
    def _check_watchdog(self) -> EngineConfig:
        seconds = self.watchdog.limits(self.timeout_seconds).step
        if seconds is not None and seconds >= self.timeout_seconds:
            raise ValueError(
                f"watchdog.step_seconds={seconds:g} must be less than timeout_seconds={self.timeout_seconds:g}: a "
                "collective that times out first does not tell which rank was missing"
            )
        return self

    @model_validator(mode="after")
    def _check_stage(self) -> EngineConfig:
        if self.precision == "fp16" and self.zero_stage == 0:
            # DeepSpeed 0.19.8 divides gradients by a scale there that it has not multiplied the loss with.
            raise ValueError("precision=fp16 needs zero_stage=1 or more: DeepSpeed does not scale the loss at stage 0")
        needed = {"none": 0, "optimizer": 1, "optimizer_and_weights": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload={self.offload} needs zero_stage={needed} or more, got {self.zero_stage}")
        return self
