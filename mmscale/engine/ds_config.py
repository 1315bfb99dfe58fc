"""The configuration dictionary for DeepSpeed.

DeepSpeed partitions, communicates and steps the optimizer. Its other features (schedules, optimizers, batch arithmetic,
checkpoints) are not used.

Measured CPU time of a step on one rank: torch without DeepSpeed 496 ms, stage 2 540 ms, stage 3 612 ms. It is the
minimum of 13 steps (quickstart model, 2 gloo ranks with one thread each, 2-core AMD EPYC Zen 3, AVX2). With DeepSpeed's
defaults stage 3 takes 897 ms. Gathering whole blocks (``engine/graph.py``) saves 190 ms. Keeping no parameter whole on
every rank saves most of the remaining difference, since each of them needs its own message after the step.

At stage 3, a message of several weights or gradients costs copies on each rank. These are medians of the CPU time of 3
to 5 steps. Two gloo ranks had one thread each on a 2-core Intel Xeon with AMX, beside other work.

    28 M values, most of experts   2,616 ms; gather_bucket_elements 0: 2,306; reduce_bucket_elements 1e6 too: 2,297 ms
    5 M values, dense                537 ms; both: 498 ms
"""

from __future__ import annotations

from typing import Any

from mmscale.engine.config import EngineConfig
from mmscale.engine.precision import Precision


def deepspeed_config(config: EngineConfig, precision: Precision, *, clip: float, device_type: str) -> dict[str, Any]:
    """Return the ``config`` argument of ``deepspeed.initialize``.

    Args:
        config: The run's engine block.
        precision: The chosen number format.
        clip: Largest norm of the whole gradient, 0 for no clipping. Ignored where ``optimizer_clips``.
        device_type: ``cpu`` or ``cuda``.
    """
    clips_itself = optimizer_clips(config, precision)
    dictionary: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if clips_itself else clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(config, device_type),
    }
    if config.offload != "none":
        # Use torch's fused AdamW on the host too: DeepSpeed's own needs a compiler on every machine of a run.
        dictionary["zero_force_ds_cpu_optimizer"] = False
    if precision.name != "fp32":
        dictionary[precision.name] = {"enabled": True}
        # Otherwise bf16 gradients are summed and averaged in bf16: with 4 ranks the sum loses two of its eight bits.
        dictionary["communication_data_type"] = "fp32"
        if config.zero_stage > 0:  # Stage 0 rejects the key: it accumulates in the format of the weights.
            dictionary["data_types"] = {"grad_accum_dtype": "fp32"}
    return dictionary


def optimizer_clips(config: EngineConfig, precision: Precision) -> bool:
    """Return whether the optimizer must clip and check for non-finite gradients, because DeepSpeed does not wrap it."""
    return config.zero_stage == 0 and precision.name == "fp32"


def _zero(config: EngineConfig, device_type: str) -> dict[str, Any]:
    if config.zero_stage == 0:
        return {"stage": 0}
    block: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": config.reduce_bucket_elements,
        "allgather_bucket_size": config.gather_bucket_elements,
        "overlap_comm": config.overlap_communication and device_type == "cuda",
        "contiguous_gradients": True,
    }
    if config.offload != "none":
        block["offload_optimizer"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if config.offload == "optimizer_and_weights":
        block["offload_param"] = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if config.zero_stage == 3:
        block |= {
            "stage3_allgather_sequential": config.gather_bucket_elements == 0,
            "stage3_prefetch_bucket_size": config.gather_bucket_elements,
            "stage3_param_persistence_threshold": config.persistent_parameter_elements,
            # If enabled, it replaces torch.nn.functional.linear in the whole process by a slower Python function.
            "memory_efficient_linear": False,
            "stage3_max_live_parameters": config.live_parameter_elements,
            # A gathered weight is kept if its next use is at most this many values ahead.
            "stage3_max_reuse_distance": config.live_parameter_elements,
        }
    return block
