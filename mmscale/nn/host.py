"""Copies of host arrays to the device of a model."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: Tensor | npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return host values on a device. On CUDA the host does not wait for the copy, because its source is pinned.

    The caching allocator of pinned memory reuses a source only after its copy.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
