"""Batches on their way to the consumer: tensors in a few buffers that go round, everything else beside them.

    worker    Outbox: join --> buffer, wrap --> Parcel --queue--> Inbox: open --> batches    consumer
                           ^                                                          |
                           '--- the buffer is free again: its first byte, set when the last tensor in it is gone

Fresh memory costs a page fault every 4 KiB and, between processes, a conversation to hand it over. A buffer that goes
round costs neither; there are as many as batches are alive at once. Shared ones have no name, so that a killed process
leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.batch import MultimodalBatch, map_batch
from data_pipeline.errors import WorkerError

_ALIGNMENT = 64  # Views need their element size; a cache line suits every vector load.
_HEADER_BYTES = _ALIGNMENT
"""Of each buffer; the first byte is 1 while a batch lies in it."""
_LEAST_BYTES = 1 << 16
_MOST_FREE = 8
"""Buffers kept for later; a consumer that held many batches for a while leaves more behind."""
_SPARE = 1.25
"""A new buffer is larger than what is put in by this, so that it suits later batches too. Pages that nobody writes take
no memory."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies."""

    buffer: int
    start: int
    dtype: str
    shape: tuple[int, ...]

    def within(self, memory: Any) -> npt.NDArray[Any]:
        """Its values, a view of the memory. An array takes a fifth of the time that views of a tensor take."""
        return np.ndarray(self.shape, self.dtype, memory, self.start)


@dataclass(frozen=True)
class Parcel:
    """Batches in transit.

    Attributes:
        batches: A place instead of each tensor.
        buffers: Those that are used.
        new: Buffers that the other side does not know yet.
        gone: Buffers that will not be used again.
    """

    batches: tuple[Any, ...]
    buffers: tuple[int, ...]
    new: dict[int, Tensor]
    gone: tuple[int, ...]


@dataclass
class Outbox:
    """The side that makes batches. Not for: threads.

    A parcel is filled by ``join``, for the patches that are nearly all of its bytes, then closed by ``wrap``.
    """

    _tensors: dict[int, Tensor] = field(default_factory=dict)
    _buffers: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """The same memory."""
    _made: int = 0
    _new: list[int] = field(default_factory=list)
    _gone: list[int] = field(default_factory=list)
    _used: list[int] = field(default_factory=list)
    """Buffers of the parcel that is being filled; the last one has room."""
    _end: int = 0
    """Where the room of the last one begins."""
    _filled: int = 0
    """Bytes put into this parcel."""
    _usual: int = 0
    """Bytes of the parcel before."""
    _places: dict[int, _Place] = field(default_factory=dict)
    """What ``join`` gave out for this parcel, by address."""

    def join(self, arrays: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Arrays of equally many columns as one tensor that travels without another copy."""
        rows, columns = sum(len(array) for array in arrays), arrays[0].shape[1]
        place = self._place("|u1", (rows, columns))
        values = place.within(self._buffers[place.buffer])
        np.concatenate(arrays, out=values)
        tensor = torch.from_numpy(values)
        self._places[tensor.data_ptr()] = place
        return tensor

    def wrap(self, batches: tuple[MultimodalBatch, ...]) -> Parcel:
        """A parcel with all tensors; those that ``join`` did not give are copied."""

        def store(tensor: Tensor) -> _Place:
            place, values = self._places.get(tensor.data_ptr()), tensor.numpy()
            if place is None or (place.dtype, place.shape) != (values.dtype.str, values.shape):
                place = self._place(values.dtype.str, values.shape)
                np.copyto(place.within(self._buffers[place.buffer]), values)
            return place

        emptied = tuple(map_batch(batch, Tensor, store) for batch in batches)
        new = {number: self._tensors[number] for number in self._new}
        parcel = Parcel(emptied, tuple(self._used), new, tuple(self._gone))
        self._usual, self._filled = self._filled, 0
        self._places, self._used, self._new, self._gone = {}, [], [], []
        return parcel

    def _place(self, dtype: str, shape: tuple[int, ...]) -> _Place:
        """Room for a tensor."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        if not self._used or start + num_bytes > len(self._buffers[self._used[-1]]):
            self._open(num_bytes)
            start = self._end
        self._end = start + num_bytes
        self._filled += num_bytes + _ALIGNMENT
        return _Place(self._used[-1], start, dtype, shape)

    def _open(self, num_bytes: int) -> None:
        """Goes on in another buffer, with room for so much and for what the parcel usually holds further."""
        self._used.append(self._take(_HEADER_BYTES + max(num_bytes, self._usual - self._filled)))
        self._end = _HEADER_BYTES

    def _take(self, num_bytes: int) -> int:
        """The smallest free buffer that has the room; or else a new one, instead of a free one that is too small."""
        free = sorted((len(buffer), number) for number, buffer in self._buffers.items() if not buffer[0])
        number = next((number for size, number in free if size >= num_bytes), None)
        surplus = len(free) - 1 - _MOST_FREE
        if number is None:
            number, surplus = self._make(max(_LEAST_BYTES, int(num_bytes * _SPARE))), max(1, surplus)
        self._buffers[number][0] = 1
        for useless in [each for _, each in free if each != number][: max(0, surplus)]:
            self._gone.append(useless)
            del self._buffers[useless], self._tensors[useless]
        return number

    def _make(self, num_bytes: int) -> int:
        number = self._made
        self._made += 1
        # Shared from the start, as torch's own ``default_collate`` does it: the pipe would copy all else.
        self._tensors[number] = torch.empty(0, dtype=torch.uint8).set_(_shared_memory(num_bytes))
        self._buffers[number] = self._tensors[number].numpy()
        self._new.append(number)
        return number


def _shared_memory(num_bytes: int) -> torch.UntypedStorage:
    """Memory of no file system, so that a small /dev/shm (64 MiB in Docker) does not limit it.

    Raises:
        WorkerError: the system gives no more memory.
    """
    try:
        if not hasattr(os, "memfd_create"):
            return torch.UntypedStorage._new_shared(num_bytes)
        handle = os.memfd_create("mmscale-batch")
        try:
            os.truncate(handle, num_bytes)
            storage: Any = torch.UntypedStorage
            return cast(torch.UntypedStorage, storage._new_shared_fd_cpu(handle, num_bytes))  # Copies the handle.
        finally:
            os.close(handle)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise WorkerError(
            f"a loader worker got no {num_bytes} bytes of shared memory for a batch ({reason}); lower data.workers, "
            "data.prefetch or data.packing.max_tokens, or raise the memory limit of the container"
        ) from error


class Inbox:
    """The side of the consumer, for the parcels of one outbox in the order in which they were wrapped."""

    def __init__(self) -> None:
        self._buffers: dict[int, npt.NDArray[np.uint8]] = {}

    def open(self, parcel: Parcel) -> tuple[MultimodalBatch, ...]:
        """The batches; their tensors are views of the buffers, which go back when nothing refers to them any more."""
        self._buffers |= {number: buffer.numpy() for number, buffer in parcel.new.items()}
        lent = {number: _lend(self._buffers[number]) for number in parcel.buffers}
        for number in parcel.gone:
            self._buffers.pop(number, None)
        return tuple(
            cast(
                MultimodalBatch,
                map_batch(batch, _Place, lambda place: torch.from_numpy(place.within(lent[place.buffer]))),
            )
            for batch in parcel.batches
        )


def _lend(buffer: npt.NDArray[np.uint8]) -> Any:
    """The memory of the buffer, which is marked as free when no array over it is left.

    Of an array or a memoryview numpy would keep what that shows, and forget the thing itself.
    """
    lease = (ctypes.c_uint8 * len(buffer)).from_buffer(buffer.data)
    weakref.finalize(lease, _release, buffer, os.getpid()).atexit = False
    return lease


def _release(buffer: npt.NDArray[np.uint8], owner: int) -> None:
    if os.getpid() == owner:  # A fork ends its copies of the tensors, not the batch.
        buffer[0] = 0
