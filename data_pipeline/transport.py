"""Batches between processes: every tensor in one flat buffer, everything else beside it.

A step of a worker holds a hundred small tensors; each would cost a file descriptor and a round trip in shared memory.
One buffer costs one. What is large is made in shared memory (``shared_empty``) and travels as it is, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from data_pipeline.batch import BranchedSegments, MediaBlock, MultimodalBatch, Segments

_WORTH_BYTES = 1 << 20
"""From here on a file descriptor costs less than a copy."""
_ALIGNMENT = 16  # Views need their element size; 16 bytes suit every vector load.


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the buffer."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Parcel:
    """Batches in transit."""

    buffer: Tensor
    batches: tuple[Any, ...]

    def open(self) -> tuple[MultimodalBatch, ...]:
        """The batches; their tensors are views of the buffer."""

        def restore(slot: _Slot) -> Tensor:
            flat = self.buffer[slot.start : slot.start + slot.num_bytes]
            return flat.view(slot.dtype).view(slot.shape)

        return cast(tuple[MultimodalBatch, ...], _map(self.batches, _Slot, restore))


def shared_empty(rows: int, columns: int) -> Tensor:
    """uint8 ``(rows, columns)``, in shared memory if that is worth it."""
    if rows * columns < _WORTH_BYTES:
        return torch.empty((rows, columns), dtype=torch.uint8)
    return _shared(rows * columns).view(rows, columns)


def _shared(num_bytes: int) -> Tensor:
    # As torch's own ``default_collate`` does it: the queue would copy anything else once more.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes))


def wrap(batches: tuple[MultimodalBatch, ...]) -> Parcel:
    """Copies every tensor of ``batches`` that is not in shared memory into one buffer that is."""
    tensors: list[tuple[_Slot, Tensor]] = []
    end = 0

    def store(tensor: Tensor) -> _Slot | Tensor:
        nonlocal end
        if tensor.is_shared():
            return tensor
        slot = _Slot(end, tensor.dtype, tuple(tensor.shape))
        end += -(-slot.num_bytes // _ALIGNMENT) * _ALIGNMENT
        tensors.append((slot, tensor))
        return slot

    emptied = _map(batches, Tensor, store)
    buffer = _shared(end)
    for slot, tensor in tensors:
        # Views of the buffer, not of the tensor: a tensor of one row may have a stride that no byte view accepts.
        buffer[slot.start : slot.start + slot.num_bytes].view(slot.dtype).view(slot.shape).copy_(tensor)
    return Parcel(buffer, emptied)


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """``value`` with every instance of ``kind`` inside its batches changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and any(isinstance(item, MultimodalBatch) for item in value):
        return tuple(_map(item, kind, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, kind, change) for key, item in value.items()}
    if isinstance(value, MultimodalBatch | MediaBlock | Segments | BranchedSegments):
        return replace(value, **{f.name: _map(getattr(value, f.name), kind, change) for f in fields(value)})
    return value
