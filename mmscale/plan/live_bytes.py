"""A counter of the bytes of live tensors, on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_key(tensor: Tensor) -> int:
    """Return the address of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators return while the mode is active, until they are freed.

    Attributes:
        live: Bytes now.
        head: The part of ``live`` that was allocated while ``in_head`` was true.
        peak, peak_head: Largest ``live`` since the last ``restart``, and ``head`` at that moment.
        in_head: Whether new storages count as ``head``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.head = self.peak = self.peak_head = 0
        self.in_head = False
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count the storages of ``tensors``."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.setdefault(storage._cdata, weakref.ref(storage))

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak, self.peak_head = self.live, self.head

    def reach(self, level: int) -> None:
        """Raise the peak to ``level``, as if this many bytes had been live."""
        if level > self.peak:
            self.peak, self.peak_head = level, self.head

    def holds(self, tensor: int) -> bool:
        """Return whether the storage with the address ``tensor`` (``storage_key``) is not freed yet."""
        return tensor in self._known

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._known:
            return
        in_head = self.in_head
        self._add(size, in_head)
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size, in_head))

    def _add(self, size: int, in_head: bool) -> None:
        self.live += size
        self.head += size * in_head
        self.reach(self.live)

    def _drop(self, key: int, size: int, in_head: bool) -> None:
        del self._known[key]
        self.live -= size
        self.head -= size * in_head
