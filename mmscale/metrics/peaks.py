"""How many operations a second a device could do: what MFU is a share of.

A GPU's figure is the published one for dense matrices. A CPU has none that would hold for the threads a rank has, so
torch's own product of large matrices is measured there. A device that is not in the table has no peak, and no MFU.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Operations a second of one rank's device, and where the figure comes from.

    ``flops`` is None where nothing is known; ``source`` then says why.
    """

    flops: float | None
    source: str


@dataclass(frozen=True)
class _Published:
    """Dense teraflops a second with float32 accumulation, without structured sparsity."""

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
"""The first row whose words all occur in the device's name holds."""

_SIDE, _TRIES = 768, 6


def peak_of(device: torch.device, dtype: torch.dtype, override: float | None = None) -> Peak:
    """The peak of ``device`` for products of ``dtype``.

    Args:
        device: Where a rank computes.
        dtype: float32 or bfloat16.
        override: Operations a second that the configuration states; wins.
    """
    if override is not None:
        return Peak(override, "metrics.peak_flops")
    if device.type == "cuda":
        return published(torch.cuda.get_device_name(device), dtype)
    return _measured(dtype)


def published(name: str, dtype: torch.dtype) -> Peak:
    """The peak of the GPU that torch calls ``name``, such as ``NVIDIA H100 80GB HBM3``."""
    words = set(name.replace("-", " ").split())
    for row in _TABLE:
        if words.issuperset(row.name):
            kind = "bf16" if dtype is torch.bfloat16 else "fp32" if _exact_float32() else "tf32"
            return Peak(1e12 * float(getattr(row, kind)), f"{row.source}: dense {kind}")
    return Peak(None, f"no published peak is known for {name!r}: set metrics.peak_flops (of one device, dense)")


def _exact_float32() -> bool:
    """Whether float32 products are computed as such, not as TF32."""
    return torch.get_float32_matmul_precision() == "highest"


@functools.cache
def _measured(dtype: torch.dtype) -> Peak:
    """The best of a few products on the CPU. Ranks of one machine measure at once and share it, as in training."""
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
