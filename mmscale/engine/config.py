"""The ``engine`` block of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.io.strict import StrictConfig
from mmscale.engine.watchdog import WatchdogConfig


class EngineConfig(StrictConfig):
    """How a run uses its machines: partitioning, precision, and memory against time."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage. The ranks shard: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of weights and activations. Master weights and the reduction of gradients are always fp32.
    ``auto``: bf16 where the hardware computes it natively (a CUDA device, or a CPU with AVX512-BF16 or AMX), else fp32.
    ``fp16`` scales the loss dynamically, and needs a CUDA device and ZeRO stage 1 or more."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every rank; ``auto`` uses CUDA if torch finds a CUDA device, else the CPU."""
    activation_checkpointing: bool = False
    """Discard the activations of each block and recompute them in the backward pass: about a third more time, far less
    memory."""
    attention: Literal["auto", "sdpa", "flash", "torch_varlen"] = "auto"
    """Attention backend, chosen once when the model is built. A named backend that is not available raises an error."""
    micro_lanes: int = Field(default=1, ge=1)
    """Lanes (rows of the global batch) in a microbatch, at least 1. A larger value takes fewer passes and more
    memory."""
    offload: Literal["none", "optimizer", "optimizer_and_weights"] = "none"
    """State kept in the host's memory. ``optimizer``: master weights and optimizer state (ZeRO stages 1 to 3).
    ``optimizer_and_weights``: also the shards of the weights (stage 3). Allowed on a CPU device, but saves nothing."""
    expert_parallel: int = Field(default=1, ge=1)
    """Number of consecutive ranks that share the experts of each layer (expert parallelism). Each of them holds an
    equal part of the experts, and token rows travel to the rank that holds their experts. Must divide the number of
    ranks and ``num_experts``; above 1 it needs ZeRO stage 3 and a model with experts. 1: ZeRO gathers all experts on
    every rank."""
    timeout_seconds: float = Field(default=600.0, gt=0, le=1e9)
    """Seconds to wait for another rank before it counts as lost; above 0."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Ends a run that hangs, and names the rank that the others wait for."""
    reduce_bucket_elements: int = Field(default=50_000_000, ge=1)
    """Gradient values per reduction message (stages 1 to 3); at least 1. At stage 3 a larger gradient is reduced
    without a copy; on a CPU a million saves time."""
    gather_bucket_elements: int = Field(default=50_000_000, ge=0)
    """Weight values per gather message after a step (stages 1 and 2; at least 1), or to prefetch (stage 3). 0, at stage
    3: gather each weight in a message of its own when it is needed. This saves two copies of each weight, and on a CPU
    time; on CUDA, gathering then does not overlap with computation."""
    persistent_parameter_elements: int = Field(default=0, ge=0)
    """Stage 3 keeps parameters with fewer values than this whole on every rank. Each of them then needs its own message
    after every step, while other parameters are gathered block by block; 0 keeps none."""
    live_parameter_elements: int = Field(default=1_000_000_000, ge=0)
    """Stage 3 keeps up to this many gathered values between forward and backward pass. A lower value takes less memory,
    but more values are gathered again; 0 holds the weights of one block at a time."""
    overlap_communication: bool = True
    """Reduce gradients during the backward pass (stages 1 to 3 on CUDA; gloo has no streams to overlap)."""

    @model_validator(mode="after")
    def _check_watchdog(self) -> EngineConfig:
        seconds = self.watchdog.limits(self.timeout_seconds).step
        if seconds is not None and seconds >= self.timeout_seconds:
            raise ValueError(
                f"watchdog.step_seconds={seconds:g} must be less than timeout_seconds={self.timeout_seconds:g}: a "
                "collective that times out first does not name the missing rank"
            )
        return self

    @model_validator(mode="after")
    def _check_stage(self) -> EngineConfig:
        if self.precision == "fp16" and self.zero_stage == 0:
            # At stage 0 DeepSpeed 0.19.8 divides gradients by the loss scale without having multiplied the loss by it.
            raise ValueError("precision=fp16 needs zero_stage=1 or more: DeepSpeed does not scale the loss at stage 0")
        if self.gather_bucket_elements == 0 and self.zero_stage in (1, 2):
            raise ValueError(f"gather_bucket_elements=0 needs zero_stage=3, got {self.zero_stage}: set at least 1")
        if self.expert_parallel > 1 and self.zero_stage < 3:
            raise ValueError(
                f"expert_parallel={self.expert_parallel} needs zero_stage=3, got {self.zero_stage}: below stage 3 each "
                "rank holds all experts; set zero_stage=3 or expert_parallel=1"
            )
        needed = {"none": 0, "optimizer": 1, "optimizer_and_weights": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload={self.offload} needs zero_stage={needed} or more, got {self.zero_stage}")
        return self
