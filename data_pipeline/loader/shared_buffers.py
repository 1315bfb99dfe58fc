"""Transfer of batches from a worker process: tensors in reused shared-memory buffers, the rest in a pipe.

    worker     BatchSender.join --> buffer, .encode --> BatchMessage --pipe-->  BatchReceiver.decode --> batches
                                      ^                                                              |
                                      '--- first byte cleared when the last tensor in it is freed ---'

New memory costs a page fault for every 4 KiB, and a file descriptor must be sent to the other process. A reused buffer
costs neither. There are about as many buffers as batches alive at once. The shared memory has no name in the file
system, so a killed process leaves no files.
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
"""Bytes at the start of each buffer; the first byte is 1 while the buffer is in use, else 0."""
_MIN_BUFFER_BYTES = 1 << 16
_MAX_FREE_BUFFERS = 8
"""Number of free buffers to keep. The sender deletes further ones the next time it needs a buffer."""
_SPARE = 1.25
"""Factor by which a new buffer exceeds the required size, so that later batches fit too. Pages that are not written use
no memory."""


@dataclass(frozen=True)
class _TensorSlot:
    """Number of a buffer, and the byte offset, dtype and shape of a tensor in the buffer."""

    buffer: int
    start: int
    dtype: str
    shape: tuple[int, ...]

    def view(self, memory: Any) -> npt.NDArray[Any]:
        """Return the values as a view of the buffer. A numpy view takes a fifth of the time of a view of a tensor."""
        return np.ndarray(self.shape, self.dtype, memory, self.start)


@dataclass(frozen=True)
class BatchMessage:
    """The pickled form of batches.

    Attributes:
        batches: The batches with a ``_TensorSlot`` in place of each tensor.
        buffers: Numbers of the buffers that they use.
        new: Buffers that the receiver does not have yet, by number.
        removed: Numbers of buffers that the sender has deleted.
    """

    batches: tuple[Any, ...]
    buffers: tuple[int, ...]
    new: dict[int, Tensor]
    removed: tuple[int, ...]


@dataclass
class BatchSender:
    """The worker's side. Not thread-safe.

    Call ``join`` for the patches, which are nearly all bytes of a batch, then ``encode`` for the batches that use them.
    """

    _tensors: dict[int, Tensor] = field(default_factory=dict)
    _buffers: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """Views of the memory of ``_tensors``."""
    _num_created: int = 0
    _new: list[int] = field(default_factory=list)
    _removed: list[int] = field(default_factory=list)
    _used: list[int] = field(default_factory=list)
    """Buffers of the current message; the next tensor goes into the last one."""
    _end: int = 0
    """Offset of the free part of the last buffer."""
    _message_bytes: int = 0
    """Bytes of the current message so far."""
    _last_message_bytes: int = 0
    _joined: dict[int, _TensorSlot] = field(default_factory=dict)
    """Slots of the tensors that ``join`` returned for the current message, by address."""

    def join(self, arrays: Sequence[npt.NDArray[Any]]) -> Tensor:
        """Concatenate arrays with the same dtype and number of columns to a tensor that ``encode`` need not copy."""
        rows, columns = sum(len(array) for array in arrays), arrays[0].shape[1]
        slot = self._reserve(arrays[0].dtype.str, (rows, columns))
        values = slot.view(self._buffers[slot.buffer])
        np.concatenate(arrays, out=values)
        tensor = torch.from_numpy(values)
        self._joined[tensor.data_ptr()] = slot
        return tensor

    def encode(self, batches: tuple[MultimodalBatch, ...]) -> BatchMessage:
        """Return a message with all tensors, and begin a new message. Tensors that are not from ``join`` are copied."""

        def store(tensor: Tensor) -> _TensorSlot:
            slot, values = self._joined.get(tensor.data_ptr()), tensor.numpy()
            if slot is None or (slot.dtype, slot.shape) != (values.dtype.str, values.shape):
                slot = self._reserve(values.dtype.str, values.shape)
                np.copyto(slot.view(self._buffers[slot.buffer]), values)
            return slot

        encoded = tuple(map_batch(batch, Tensor, store) for batch in batches)
        new = {number: self._tensors[number] for number in self._new}
        message = BatchMessage(encoded, tuple(self._used), new, tuple(self._removed))
        self._last_message_bytes, self._message_bytes = self._message_bytes, 0
        self._joined, self._used, self._new, self._removed = {}, [], [], []
        return message

    def _reserve(self, dtype: str, shape: tuple[int, ...]) -> _TensorSlot:
        """Reserve memory for a tensor."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        if not self._used or start + num_bytes > len(self._buffers[self._used[-1]]):
            self._begin_buffer(num_bytes)
            start = self._end
        self._end = start + num_bytes
        self._message_bytes += num_bytes + _ALIGNMENT
        return _TensorSlot(self._used[-1], start, dtype, shape)

    def _begin_buffer(self, num_bytes: int) -> None:
        """Add a buffer to the message, for at least ``num_bytes``.

        If the last message was larger than this one is so far, the buffer has room for the difference.
        """
        rest = self._last_message_bytes - self._message_bytes
        self._used.append(self._acquire_buffer(_HEADER_BYTES + max(num_bytes, rest)))
        self._end = _HEADER_BYTES

    def _acquire_buffer(self, num_bytes: int) -> int:
        """Return the smallest free buffer of at least ``num_bytes``, or else a new one.

        Keeps ``_MAX_FREE_BUFFERS`` other free buffers (one more if it creates a buffer) and deletes the smallest ones.
        If it creates a buffer, it deletes at least one, unless none is free.
        """
        free = sorted((len(buffer), number) for number, buffer in self._buffers.items() if not buffer[0])
        number = next((number for size, number in free if size >= num_bytes), None)
        surplus = len(free) - 1 - _MAX_FREE_BUFFERS
        if number is None:
            number, surplus = self._create_buffer(max(_MIN_BUFFER_BYTES, int(num_bytes * _SPARE))), max(1, surplus)
        self._buffers[number][0] = 1
        for useless in [each for _, each in free if each != number][: max(0, surplus)]:
            self._removed.append(useless)
            del self._buffers[useless], self._tensors[useless]
        return number

    def _create_buffer(self, num_bytes: int) -> int:
        number = self._num_created
        self._num_created += 1
        # Shared from the start, as in torch's ``default_collate``: pickling other memory would copy it.
        self._tensors[number] = torch.empty(0, dtype=torch.uint8).set_(_shared_memory(num_bytes))
        self._buffers[number] = self._tensors[number].numpy()
        self._new.append(number)
        return number


def _shared_memory(num_bytes: int) -> torch.UntypedStorage:
    """Allocate shared memory outside of /dev/shm, whose size is often limited (64 MiB in Docker).

    Falls back to torch's own shared memory where the system has no ``memfd_create``.

    Raises:
        WorkerError: the allocation failed.
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
            f"a loader worker could not allocate {num_bytes} bytes of shared memory for a batch ({reason}); lower "
            "data.workers, "
            "data.prefetch or data.packing.max_tokens, or raise the container's memory limit"
        ) from error


class BatchReceiver:
    """The consumer's side. Decode all messages of one ``BatchSender``, in the order in which they were encoded."""

    def __init__(self) -> None:
        self._buffers: dict[int, npt.NDArray[np.uint8]] = {}

    def decode(self, message: BatchMessage) -> tuple[MultimodalBatch, ...]:
        """Return the batches. Their tensors are views of the buffers; a buffer is reused when they are all freed."""
        self._buffers |= {number: buffer.numpy() for number, buffer in message.new.items()}
        memory = {number: _tracked(self._buffers[number]) for number in message.buffers}
        for number in message.removed:
            self._buffers.pop(number, None)
        return tuple(
            cast(
                MultimodalBatch,
                map_batch(batch, _TensorSlot, lambda slot: torch.from_numpy(slot.view(memory[slot.buffer]))),
            )
            for batch in message.batches
        )


def _tracked(buffer: npt.NDArray[np.uint8]) -> Any:
    """Return the buffer's memory as an object; the buffer is marked as free when no array over the object is left.

    The object is a ctypes array: numpy views of an array or a memoryview keep its memory alive, but not the object.
    """
    memory = (ctypes.c_uint8 * len(buffer)).from_buffer(buffer.data)
    weakref.finalize(memory, _mark_free, buffer, os.getpid()).atexit = False
    return memory


def _mark_free(buffer: npt.NDArray[np.uint8], owner: int) -> None:
    if os.getpid() == owner:  # A forked process frees its copies of the tensors while the parent still uses them.
        buffer[0] = 0
