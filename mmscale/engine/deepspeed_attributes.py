"""The private attributes of DeepSpeed that mmscale reads, checked when an engine starts.

DeepSpeed has no public interface to the values that each rank owns. ``partition.py``, ``precision.py``,
``construct.py`` and ``Engine`` therefore read attributes that another version may rename. A missing one would otherwise
fail in the middle of a run, for example at the first checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmscale.errors import UnsupportedError

KNOWN_VERSIONS = "0.19.8"
"""The version whose engines pass the tests. 0.19.0 fails an assertion in bf16 steps without a gradient."""
_ENGINE = (
    *("optimizer", "basic_optimizer", "backward", "step", "destroy"),
    *("get_global_grad_norm", "set_gradient_accumulation_boundary", "was_step_applied"),
)
_STAGE_3 = (
    *("averaged_gradients", "fp16_groups", "fp32_partitioned_groups_flat", "grad_position", "get_param_id"),
    *("offload_optimizer", "optimizer", "persistent_parameters", "sub_group_to_group_id", "_global_grad_norm"),
    *("flatten", "grad_partitions_flat_buffer"),
)
_STAGE_1_2 = (
    *("averaged_gradients", "bit16_groups", "cpu_offload", "optimizer", "single_partition_of_fp32_groups"),
    *("update_lp_params", "_global_grad_norm"),
)
_STAGE_1_BF16 = ("bf16_groups", "fp32_groups_gradient_flat_partition", "optimizer", "update_lp_params")
_STAGE_0_WRAPPER = ("fp16_groups", "fp32_groups", "_global_grad_norm")
_LOSS_SCALER = ("cur_hysteresis", "cur_iter", "cur_scale", "last_overflow_iter")
_STAGE_3_PARAMETER = ("ds_numel", "ds_numel_aligned", "ds_process_group", "ds_shape", "ds_tensor")


def check_attributes(deepspeed_engine: Any, model: nn.Module, zero_stage: int, version: str) -> None:
    """Check that a started DeepSpeed engine has the attributes that mmscale reads.

    Args:
        deepspeed_engine: The engine that ``deepspeed.initialize`` returned.
        model: The bare model.
        zero_stage: 0-3.
        version: Version of DeepSpeed, for the message.

    Raises:
        UnsupportedError: an attribute is missing; the message names all of them and the versions that have them.
    """
    missing = _missing(deepspeed_engine, "engine", _ENGINE)
    if not missing:
        missing += _missing_of_optimizer(deepspeed_engine, zero_stage)
    for parameter in model.parameters():
        if zero_stage == 3:
            missing += _missing(parameter, "parameter", _STAGE_3_PARAMETER)
        elif zero_stage and parameter.requires_grad:
            missing += _missing(parameter, "parameter", ("_hp_mapping",))
        break
    if missing:
        raise UnsupportedError(
            f"DeepSpeed {version} lacks what mmscale reads at ZeRO stage {zero_stage}: {', '.join(missing)}. "
            f"DeepSpeed {KNOWN_VERSIONS} is known to work: pip install 'deepspeed>=0.19.8,<0.20'"
        )


def _missing_of_optimizer(deepspeed_engine: Any, zero_stage: int) -> list[str]:
    wrapper = deepspeed_engine.optimizer
    if zero_stage == 3:
        wanted: tuple[str, ...] = _STAGE_3
    elif zero_stage:
        # Stage 1 in bf16 has its own wrapper class.
        wanted = _STAGE_1_BF16 if hasattr(wrapper, "bf16_groups") else _STAGE_1_2
    else:
        wanted = () if wrapper is deepspeed_engine.basic_optimizer else _STAGE_0_WRAPPER
    missing = _missing(wrapper, "optimizer", wanted)
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is not None:
        missing += _missing(scaler, "loss_scaler", ("dynamic",))
        if getattr(scaler, "dynamic", False):
            missing += _missing(scaler, "loss_scaler", _LOSS_SCALER)
    return missing


def _missing(owner: Any, name: str, attributes: tuple[str, ...]) -> list[str]:
    return [f"{name}.{attribute}" for attribute in attributes if not hasattr(owner, attribute)]
