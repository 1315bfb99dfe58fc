"""Peak floating-point operations per second of a device, the reference for MFU.

For a GPU this is the published value for dense matrices. No published value of a CPU fits the number of threads of a
rank, so a large matrix product is measured there. A GPU that is not in the table has no peak, and the run has no MFU.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Peak operations per second of one rank's device, and their source.

    ``flops`` is None if the device is unknown. ``source`` is then the reason.
    """

    flops: float | None
    source: str


@dataclass(frozen=True)
class _Published:
    """Dense teraflops per second with float32 accumulation, without structured sparsity."""

    name: tuple[str, ...]
    bf16: float
    tf32: float
    fp32: float
    source: str


_HOPPER = "NVIDIA H100 datasheet, half of the figure with sparsity"
_TABLE = (
    _Published(("B200",), 2250, 1125, 75, "NVIDIA HGX B200 datasheet, an eighth of eight GPUs, half of with sparsity"),
    _Published(("GH200",), 989.5, 494.5, 67, "NVIDIA GH200 datasheet, half of the figure with sparsity"),
    _Published(("H200", "NVL"), 835.5, 417.5, 60, "NVIDIA H200 datasheet, half of the figure with sparsity"),
    _Published(("H200",), 989.5, 494.5, 67, "NVIDIA H200 datasheet, half of the figure with sparsity"),
    _Published(("H100", "NVL"), 835.5, 417.5, 60, _HOPPER),
    _Published(("H100", "PCIe"), 756.5, 378, 51, _HOPPER),
    _Published(("H100", "HBM3"), 989.5, 494.5, 67, _HOPPER),
    _Published(("A100",), 312, 156, 19.5, "NVIDIA A100 datasheet"),
    _Published(("A40",), 149.7, 74.8, 37.4, "NVIDIA A40 datasheet"),
    _Published(("A10",), 125, 62.5, 31.2, "NVIDIA A10 datasheet"),
    _Published(("L40S",), 362, 183, 91.6, "NVIDIA L40S datasheet"),
    _Published(("L4",), 121, 60, 30.3, "NVIDIA L4 datasheet, half of the figure with sparsity"),
)
"""The first row whose words all occur in the device's name is used. The peak of bf16 is also that of fp16."""

_SIDE, _TRIES = 768, 6


def peak_of(device: torch.device, dtype: torch.dtype, override: float | None = None) -> Peak:
    """Return the peak of ``device`` for matrix products of ``dtype``.

    Args:
        device: Device of the rank.
        dtype: float32, bfloat16 or float16.
        override: The value of ``metrics.peak_flops``. If given, it is returned.
    """
    if override is not None:
        return Peak(override, "metrics.peak_flops")
    if device.type == "cuda":
        return published(torch.cuda.get_device_name(device), dtype)
    return _measured(dtype)


def published(name: str, dtype: torch.dtype) -> Peak:
    """Return the published peak of a GPU by its name in torch, such as ``NVIDIA H100 80GB HBM3``."""
    words = set(name.replace("-", " ").split())
    for row in _TABLE:
        if words.issuperset(row.name):
            kind = "bf16" if dtype.itemsize == 2 else "fp32" if _exact_float32() else "tf32"
            return Peak(1e12 * float(getattr(row, kind)), f"{row.source}: dense {kind}")
    return Peak(None, f"no published peak is known for {name!r}: set metrics.peak_flops (of one device, dense)")


def _exact_float32() -> bool:
    """Return whether float32 products are computed in float32 and not in TF32."""
    return torch.get_float32_matmul_precision() == "highest"


@functools.cache
def _measured(dtype: torch.dtype) -> Peak:
    """Measure matrix products on the CPU and return the best. Ranks of one machine measure at the same time."""
    left = torch.full((_SIDE, _SIDE), 0.5, dtype=dtype)
    right, result = left.clone(), left.clone()
    best = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        torch.mm(left, right, out=result)
        best = min(best, time.perf_counter() - start)
    threads = torch.get_num_threads()
    what = f"{_SIDE} x {_SIDE} {str(dtype).removeprefix('torch.')} product on {threads} thread{'s' * (threads > 1)}"
    return Peak(2 * _SIDE**3 / best, f"measured here: a {what}, best of {_TRIES}")
