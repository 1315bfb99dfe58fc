"""The number format of weights and activations, and the state of fp16's dynamic loss scale.

The attributes of the loss scaler are as read in DeepSpeed 0.19, stages 1 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmscale.engine.config import EngineConfig
from mmscale.errors import UnsupportedError

_NATIVE_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Precision:
    """A chosen number format.

    Attributes:
        name: ``fp32``, ``bf16`` or ``fp16``.
        reason: Why it was chosen, for the log.
    """

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the instruction set flags of this machine's processor; empty if the system does not report them."""
    try:
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        return frozenset()
    return frozenset()


def choose_precision(config: EngineConfig, device: torch.device, flags: frozenset[str] | None = None) -> Precision:
    """Resolve ``config.precision`` for ``device``.

    bf16 trains 1.7 to 1.9 times faster than fp32 on a CPU with AVX512-BF16. On a CPU with only AVX2, bf16 is emulated
    and seven times slower. So ``auto`` chooses bf16 on a CPU only if ``flags`` (by default this CPU's) list support.

    Raises:
        UnsupportedError: ``bf16`` is configured for a CUDA device without bf16, or ``fp16`` for a CPU.
    """
    if config.precision == "fp16" and device.type != "cuda":
        raise UnsupportedError(
            "engine.precision=fp16: only CUDA devices train in fp16, this run is on a CPU; use fp32, or bf16"
        )
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        evidence = f"{torch.cuda.get_device_name(device)} {'computes' if native else 'does not compute'} bf16 natively"
    else:
        found = [flag for flag in _NATIVE_BF16_FLAGS if flag in (cpu_flags() if flags is None else flags)]
        native = bool(found)
        evidence = f"the CPU has {found[0]}" if found else "the CPU has neither avx512_bf16 nor amx_bf16"
    if config.precision == "auto":
        return Precision("bf16" if native else "fp32", f"auto: {evidence}")
    if config.precision == "bf16" and not native:
        if device.type == "cuda":
            raise UnsupportedError(f"engine.precision=bf16: {evidence}; use engine.precision=fp32")
        return Precision("bf16", f"as configured; {evidence}, so it is emulated and several times slower than fp32")
    return Precision(config.precision, "as configured")


def loss_scaler_state(optimizer: Any) -> dict[str, float] | None:
    """Return scale and counters of a DeepSpeed optimizer wrapper; None if the loss is not scaled dynamically."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return {name: float(getattr(scaler, name)) for name in _SCALER_FIELDS}


def set_loss_scaler_state(optimizer: Any, state: dict[str, float] | None) -> None:
    """Restore what ``loss_scaler_state`` returned. Does nothing without a state or without dynamic scaling."""
    if state is None or loss_scaler_state(optimizer) is None:
        return
    for name in _SCALER_FIELDS:
        setattr(optimizer.loss_scaler, name, state[name] if name == "cur_scale" else int(state[name]))
