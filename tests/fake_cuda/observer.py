"""Records what a GPU would do badly or refuse while operations run on fake CUDA tensors.

waits     the host waits for the device: a value or a size that depends on values
uploads   a copy from host memory that is not pinned, during which the host waits too
dtypes    matrix products of different dtypes, and float64 on the device
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.", "aten._grouped_mm.")
_OURS = ("/mmscale/", "/data_pipeline/", "/fake_cuda/planted")


def own_line() -> str:
    """Return file and function of the innermost frame in the code of this project, and the text of its line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.replace("\\", "/")
        if any(part in path for part in _OURS) and "/site-packages/" not in path:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            return f"{'/'.join(path.split('/')[-2:])} {frame.f_code.co_name}: {line}"
        frame = frame.f_back
    return "no line of the project"


def on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class Observer(TorchDispatchMode):
    """Inside this context every operation is examined; ``found`` counts the findings by kind and line."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.pinned = WeakTensorKeyDictionary()
        """The keys are the tensors that ``Tensor.pin_memory`` returned."""
        self._fake = fake

    def add(self, kind: str) -> None:
        self.found[kind, own_line()] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, str(func)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._copies(name, args, kwargs)
        if name.startswith(_PRODUCTS) and len({leaf.dtype for leaf in leaves if leaf.is_floating_point()}) > 1:
            self.add("dtypes")
        if any(map(on_cuda, leaves)) and any(leaf.dtype is torch.float64 and leaf.dim() for leaf in leaves):
            self.add("float64")
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, AssertionError) as error:
            raise type(error)(f"{name}: {error}") from error
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.add("waits")
            return self._plausible(name, args)

    def _copies(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name.startswith(("aten.index.", "aten.index_put")) and on_cuda(args[0]):
            # The kernel copies indices of the host itself.
            hosts = [index for index in args[1] if isinstance(index, Tensor) and not index.is_cuda]
            if hosts:
                self.add("uploads")
            return
        if name == "aten._to_copy.default":
            source, target = args[0], kwargs.get("device")
        elif name == "aten.copy_.default":
            source, target = args[1], args[0].device
        else:
            return
        if target is None or torch.device(target).type == source.device.type:
            return
        if source.device.type == "cuda":
            self.add("waits")
        elif source not in self.pinned or not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
            self.add("uploads")

    def _plausible(self, name: str, args: tuple[Any, ...]) -> Any:
        """Return a result in place of one that depends on values."""
        source = args[0]
        if name.startswith("aten._local_scalar_dense"):
            if source.dtype in (torch.bool, torch.uint8):  # A flag; DeepSpeed's of an overflow is uint8.
                return False
            return 1.0 if source.is_floating_point() else 1
        if name.startswith("aten.nonzero"):
            return source.new_zeros((max(1, source.numel() // 2), source.dim()), dtype=torch.int64)
        if name.startswith("aten.bincount"):
            return source.new_zeros(args[2] if len(args) > 2 else 1, dtype=torch.int64)
        raise NotImplementedError(f"{name} depends on values, at {own_line()}")


@contextmanager
def fake_constructors(fake: FakeTensorMode, observer: Observer) -> Iterator[None]:
    """Let ``torch.tensor(..., device="cuda")``, ``torch.from_numpy`` and ``Tensor.pin_memory`` return fake tensors.

    The first copies from pageable memory: an upload. The last is not implemented for fake tensors.
    """
    right, right_numpy = torch.tensor, torch.from_numpy

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = right(data, **options)
        if device is None or torch.device(device).type != "cuda":
            return made
        observer.add("uploads")
        return fake.from_tensor(made).to("cuda", non_blocking=True)

    def pin_memory(self: Tensor, *_: Any) -> Tensor:
        made = fake.from_tensor(self).clone()
        observer.pinned[made] = True
        return made

    right_pin = Tensor.pin_memory
    torch.tensor, torch.from_numpy = tensor, lambda array: fake.from_tensor(right_numpy(array))
    Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.tensor, torch.from_numpy = right, right_numpy
        Tensor.pin_memory = right_pin  # type: ignore[method-assign]
