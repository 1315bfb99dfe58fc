"""The dictionary that tells DeepSpeed what this project has decided.

Everything that DeepSpeed could also do (schedules, optimizers, batch arithmetic, checkpoints) stays off; it
partitions, communicates and steps.

What stage 3 costs, in CPU time of a step and rank (least of 13 steps; quickstart model, 2 gloo ranks, one thread each,
on a 2-core AMD EPYC Zen 3, AVX2): torch without DeepSpeed 496 ms, stage 2 540 ms, stage 3 612 ms. With DeepSpeed's
defaults stage 3 takes 897 ms; gathering whole blocks (``engine/graph.py``) saves 190 of them, and keeping no matrix
whole on every rank (each is sent in a message of its own after the step) most of the rest. Bucket sizes are within
noise at this size.
"""

from __future__ import annotations

from typing import Any

from mmscale.engine.config import EngineConfig
from mmscale.engine.precision import Precision


def deepspeed_config(config: EngineConfig, precision: Precision, *, clip: float, device_type: str) -> dict[str, Any]:
    """Arguments of ``deepspeed.initialize``.

    Args:
        config: The run's engine block.
        precision: The format that was chosen.
        clip: Largest norm of the whole gradient, 0 for none. At stage 0 in fp32 the optimizer clips by itself.
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
        # torch's fused AdamW serves on the host too; DeepSpeed's own needs a compiler on every machine of a run.
        dictionary["zero_force_ds_cpu_optimizer"] = False
    if precision.name != "fp32":
        dictionary[precision.name] = {"enabled": True}
        # Otherwise bf16 gradients are added up and averaged in bf16: at 4 ranks the sum loses two of its eight bits.
        dictionary["communication_data_type"] = "fp32"
        if config.zero_stage > 0:  # Stage 0 refuses it: it accumulates in the format of the weights.
            dictionary["data_types"] = {"grad_accum_dtype": "fp32"}
    return dictionary


def optimizer_clips(config: EngineConfig, precision: Precision) -> bool:
    """Whether clipping and the non-finite check are the optimizer's own (DeepSpeed leaves it unwrapped)."""
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
            "stage3_prefetch_bucket_size": config.gather_bucket_elements,
            "stage3_param_persistence_threshold": config.persistent_parameter_elements,
            # On, it would replace torch.nn.functional.linear for the whole process by a slower Python function.
            "memory_efficient_linear": False,
            "stage3_max_live_parameters": config.live_parameter_elements,
            # How far ahead the next use of a weight may lie for it to stay.
            "stage3_max_reuse_distance": config.live_parameter_elements,
        }
    return block
